"""Whether a run's workers, CPUs and GPUs exist, asked before anything is loaded."""

import os
from pathlib import Path

from training.config.train_config import TrainConfig
from training.errors import TrainingError


def check_resources(config: TrainConfig, cpus: float, gpus: float, where: str) -> None:
    """Refuse a run that `where` (words for the machine or cluster) with that many CPUs and GPUs cannot hold.

    Raises:
        TrainingError: naming key, value and what there is.
    """
    if config.use_gpu is True and gpus < 1:
        raise TrainingError(f"use_gpu is true, but {where} has no GPU: set use_gpu=false or 'auto'")
    per_worker = config.resources_per_worker or {}
    on_gpu = wants_gpu(config, gpus)
    gpus_each = per_worker.get("GPU", 1.0) if on_gpu else per_worker.get("GPU", 0.0)
    if config.min_workers * gpus_each > gpus:
        raise TrainingError(
            f"num_workers is {config.num_workers} with {gpus_each:g} GPU each, but {where} has {gpus:g} GPU(s): "
            f"{_fewer_workers(config, gpus / gpus_each)}" + ("" if gpus else ", or use_gpu=false")
        )
    cpus_each = per_worker.get("CPU", 1.0)
    if config.min_workers * cpus_each > cpus:
        raise TrainingError(
            f"num_workers is {config.num_workers} with {cpus_each:g} CPU each, but {where} has {cpus:g} CPU(s): "
            f"{_fewer_workers(config, cpus / cpus_each)}"
        )
    if config.quantization.compute_dtype == "float16" and not on_gpu:
        raise TrainingError("quantization.compute_dtype is 'float16', which needs a GPU: set it to 'auto'")


def _fewer_workers(config: TrainConfig, room: float) -> str:
    """What to do where there is `room` for so many workers."""
    if config.fsdp and room < 2:
        return "set num_workers to 1 and fsdp to false"
    return f"set num_workers to {max(1, int(room))} or less"


def check_this_machine(config: TrainConfig) -> None:
    """`check_resources` for the machine that this runs on."""
    gpus, bf16 = gpus_here(config), True
    if gpus:
        import torch

        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    check_resources(config, os.cpu_count() or 1, gpus, "this machine")
    if not bf16 and config.quantization.compute_dtype == "bfloat16":
        raise TrainingError(
            "quantization.compute_dtype is 'bfloat16', which this GPU lacks: set quantization.compute_dtype=auto"
        )


def gpus_here(config: TrainConfig) -> int:
    """GPUs of this machine that the run could use; imports torch only where there may be some."""
    if config.use_gpu is False or not (config.use_gpu is True or Path("/dev/nvidiactl").exists()):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def wants_gpu(config: TrainConfig, gpus: float) -> bool:
    """Whether the run uses GPUs where there are `gpus` of them."""
    return gpus >= 1 if config.use_gpu == "auto" else config.use_gpu
