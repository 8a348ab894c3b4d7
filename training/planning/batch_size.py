"""`per_device_train_batch_size: auto` and `gradient_checkpointing: auto`, decided by the memory that there is.

`training.trainer.train` asks on every worker before it loads the base, `training.planning.plan` for a dry run. What a
step computes does not change: its examples are the same however many are taken at once. Estimates are
`training.planning.memory`'s.
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

_USABLE = 0.9  # of what is free on a GPU
_USABLE_CPU = 0.6  # of what is free in main memory, which others use too
_ENOUGH_TOKENS = 4096  # at once: with fewer, reading and dequantizing the weights outweighs the forward done twice


def decide(
    config: TrainConfig, inputs: RunInputs, free_bytes: int, *, on_gpu: bool, compute_dtype: ComputeDtype
) -> TrainConfig:
    """`config` with numbers in place of `auto`.

    Checkpointing costs a second forward pass: it is left off where all examples of a worker's step fit without it, or
    `_ENOUGH_TOKENS` do. The batch is then the largest power of two that fits, at most a worker's part of a step.

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
    wanted = share if auto_batch else config.micro_batch_size
    options = (False, True) if config.gradient_checkpointing == "auto" else (config.gradient_checkpointing,)
    chosen = 0, True
    for checkpointing in options:
        step = TrainStep.of(
            config.model_copy(update={"gradient_checkpointing": checkpointing}),
            max_length=longest,
            compute_dtype=compute_dtype,
            on_gpu=on_gpu,
            gradient_accumulation_steps=2,  # gradients of earlier micro-batches may be there
            labelled_share=inputs.report.trained_share,
        )
        fitting = largest_batch(llama_config, step, free_bytes, limit=wanted)
        chosen = fitting, checkpointing
        if 2 * fitting > wanted or (auto_batch and fitting * longest >= _ENOUGH_TOKENS):
            break
    batch, checkpointing = chosen
    if auto_batch and batch == 0:
        needed = estimate(llama_config, step, 1).total_bytes
        raise TrainingError(
            f"one example of {longest} tokens needs {needed / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} GiB are free: "
            "lower max_length or lora.r, or use a larger device"
        )
    if not auto_batch:
        batch = config.micro_batch_size
    return config.model_copy(update={"per_device_train_batch_size": batch, "gradient_checkpointing": checkpointing})


def example_lengths(config: TrainConfig, inputs: RunInputs) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Tokens of every example of an epoch."""
    lengths = np.asarray(inputs.train_rows.lengths, dtype=np.int64)
    if not config.packing:
        return lengths
    from training.data.batch_sampler import pack

    return np.array([lengths[rows].sum() for rows in pack(lengths, config.max_length)])


def free_memory(device: "torch.device", num_workers: int) -> int:
    """Bytes that a worker may count on: of its GPU, or its part of this machine's memory."""
    if device.type == "cuda":
        import torch

        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(_USABLE_CPU * psutil.virtual_memory().available / num_workers)
