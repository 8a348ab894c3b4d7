"""Resolves `per_device_train_batch_size: auto` and `gradient_checkpointing: auto` from the memory that is free.

Neither changes what a step computes: its examples are the same for every micro-batch size. The memory a step needs is
estimated by `training.planning.memory`.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from training.base_models.nf4 import ComputeDtype
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs
from training.errors import TrainingError
from training.planning.memory import TrainStep, estimate, largest_batch

if TYPE_CHECKING:
    import torch

_USABLE = 0.9  # of a GPU's free memory
_USABLE_CPU = 0.6  # of free main memory, which other processes use too
_ENOUGH_TOKENS = 4096  # per micro-batch; below, reading and dequantizing weights costs more than a second forward pass


def decide(
    config: TrainConfig, inputs: RunInputs, free_bytes: int, *, on_gpu: bool, compute_dtype: ComputeDtype
) -> TrainConfig:
    """`config` with every `auto` replaced by a value.

    Checkpointing costs a second forward pass, so it stays off if all examples of a worker's step fit without it, or
    `_ENOUGH_TOKENS` do. The batch is then the largest power of two that fits, at most a worker's share of a step.

    Args:
        free_bytes: on one worker's device, before the base is loaded.

    Raises:
        TrainingError: not even the longest example fits.
    """
    auto_batch = config.per_device_train_batch_size == "auto"
    if not auto_batch and config.gradient_checkpointing != "auto":
        return config
    llama_config = inputs.base.llama_config()
    longest = int(example_lengths(config, inputs).max())
    share = math.ceil(config.step_size / config.max_workers)
    max_batch = share if auto_batch else config.micro_batch_size
    options = (False, True) if config.gradient_checkpointing == "auto" else (config.gradient_checkpointing,)
    batch, checkpointing = 0, True
    for checkpointing in options:
        step = TrainStep.of(
            config.model_copy(update={"gradient_checkpointing": checkpointing}),
            max_length=longest,
            compute_dtype=compute_dtype,
            on_gpu=on_gpu,
            gradient_accumulation_steps=2,  # gradients of earlier micro-batches may be in memory
            labelled_share=inputs.report.trained_share,
        )
        batch = largest_batch(llama_config, step, free_bytes, limit=max_batch)
        if 2 * batch > max_batch or (auto_batch and batch * longest >= _ENOUGH_TOKENS):
            break
    if auto_batch and batch == 0:
        required = estimate(llama_config, step, 1).total_bytes
        raise TrainingError(
            f"one example of {longest} tokens needs {required / 2**30:.1f} GiB, but only {free_bytes / 2**30:.1f} GiB "
            "are free: lower max_length or lora.r, or use a larger device"
        )
    if not auto_batch:
        batch = config.micro_batch_size
    return config.model_copy(update={"per_device_train_batch_size": batch, "gradient_checkpointing": checkpointing})


def example_lengths(config: TrainConfig, inputs: RunInputs) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Tokens of every example in an epoch, [num_examples]."""
    lengths = np.asarray(inputs.train_rows.lengths, dtype=np.int64)
    if not config.packing:
        return lengths
    from training.data.batch_sampler import pack

    return np.array([lengths[rows].sum() for rows in pack(lengths, config.max_length)])


def free_memory(device: "torch.device", num_workers: int) -> int:
    """Bytes available to one worker: on its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        import torch

        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(_USABLE_CPU * psutil.virtual_memory().available / num_workers)
