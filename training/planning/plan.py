"""What a run will do, before anything is loaded: rows, steps, trainable parameters, resources, memory.

Reads the data and the dimensions in `config.json`, but no weights.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml

from training.base_models.llama_shape import LlamaDims
from training.base_models.nf4 import ComputeDtype, compute_dtype_on
from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs, read_inputs
from training.planning.batch_size import decide, example_lengths
from training.planning.flops import TimeEstimate, estimate_time, training_flops
from training.planning.memory import MemoryEstimate, TrainStep, estimate
from training.planning.resources import check_this_machine, gpus_here, wants_gpu


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run.

    Attributes:
        num_left_out: rows that were read but are not used: bad, too long, duplicate, or also held out.
        num_examples: rows, or packs of rows, in an epoch.
        tokens_per_step: on average.
        largest_micro_batch: tokens of the largest possible micro-batch.
        resources_per_worker: None if the cluster decides when the run starts.
        memory: peak of one worker.
        time: on the GPUs that it names; None for a run without GPUs.
        device_memory: bytes of this machine's first GPU, or of its main memory; None for a run on a cluster.
    """

    base: str
    num_parameters: int
    num_trainable: int
    num_train_rows: int
    num_held_out: int
    num_left_out: int
    num_examples: int
    num_steps: int
    steps_per_epoch: int
    step_size: int
    tokens_per_step: float
    largest_micro_batch: int
    num_workers: int | list[int]
    resources_per_worker: dict[str, float] | None
    compute_dtype: ComputeDtype
    fsdp: bool
    memory: MemoryEstimate
    time: TimeEstimate | None
    device_memory: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the estimate fits the device; None if its memory is unknown."""
        return None if self.device_memory is None else self.memory.total_bytes <= self.device_memory

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        memory = {**asdict(self.memory), "total": self.memory.total_bytes, "allocated": self.memory.allocated_bytes}
        return {**asdict(self), "memory": memory}

    def __str__(self) -> str:
        workers = "" if isinstance(self.num_workers, int) else f" to {self.num_workers[1]}"
        first = self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]
        resources = ", ".join(f"{amount:g} {name}" for name, amount in (self.resources_per_worker or {}).items())
        resources = resources or "resources of the cluster"
        epochs = self.num_steps / self.steps_per_epoch
        unit = "rows" if self.num_examples == self.num_train_rows else "packs"
        rows = f"{self.num_train_rows:,} training and {self.num_held_out:,} held out"
        rows += f"; {self.num_left_out:,} dropped" if self.num_left_out else ""
        step = f"{self.step_size:,} {unit} and {self.tokens_per_step:,.0f} tokens"
        lines = {
            "base": f"{self.base}, {self.num_parameters:,} parameters",
            "adapter": f"{self.num_trainable:,} trainable parameters, {self.num_trainable / self.num_parameters:.2%}",
            "rows": rows,
            "steps": f"{self.num_steps:,} ({epochs:.3g} epochs), each of {step}",
            "workers": f"{first}{workers}, each with {resources}; computing in {self.compute_dtype}"
            + ("; the 4-bit base is sharded over them" if self.fsdp else ""),
            **({"time": str(self.time)} if self.time else {}),
            "memory": f"{_gib(self.memory.total_bytes)} per worker at its peak{self._available()}",
        }
        text = [f"{name:<8} {value}" for name, value in lines.items()]
        return "\n".join([*text, *(f"  {line}" for line in memory_lines(asdict(self.memory)))])

    def _available(self) -> str:
        if self.device_memory is None:
            return ""
        return f", of {_gib(self.device_memory)}" + ("" if self.fits else ": does not fit")


def make_plan(config: TrainConfig, inputs: RunInputs) -> Plan:
    """Plan a run with these inputs: on this machine, or if RAY_ADDRESS is set on a cluster's GPUs (see `use_gpu`)."""
    llama_config = inputs.base.llama_config()
    dims = LlamaDims.of(llama_config)
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    gpus = (0 if config.use_gpu is False else config.max_workers) if on_cluster else gpus_here(config)
    on_gpu = wants_gpu(config, gpus)
    dtype = _compute_dtype(config, on_gpu, gpus_here(config) > 0)
    device_memory = None if on_cluster else _device_memory(on_gpu)
    if device_memory is not None:
        config = decide(config, inputs, device_memory, on_gpu=on_gpu, compute_dtype=dtype)
    lengths = example_lengths(config, inputs)
    step_size = min(config.step_size, len(lengths))
    steps_per_epoch = math.ceil(len(lengths) / step_size)
    per_device = min(config.micro_batch_size, len(lengths))
    largest = int(np.partition(lengths, -per_device)[-per_device:].sum())
    report = inputs.report
    step = TrainStep.of(
        config,
        max_length=math.ceil(largest / per_device),
        compute_dtype=dtype,
        on_gpu=on_gpu,
        gradient_accumulation_steps=max(1, step_size // (per_device * config.max_workers)),
        labelled_share=report.trained_share,
    )
    num_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    tokens_per_step = float(lengths.sum()) / steps_per_epoch
    flops = training_flops(
        dims,
        config.lora,
        num_steps * tokens_per_step,
        float(np.mean(inputs.train_rows.lengths)),
        labelled_share=report.trained_share,
        checkpointing=step.gradient_checkpointing,
    )
    duplicates = report.num_duplicates if report.deduplicated else 0
    return Plan(
        base=inputs.base.name,
        num_parameters=dims.num_parameters,
        num_trainable=dims.num_trainable(config.lora.r, config.lora.targets),
        num_train_rows=len(inputs.train_rows),
        num_held_out=len(inputs.held_out_rows),
        num_left_out=report.num_skipped + report.num_too_long + duplicates + report.num_leaked,
        num_examples=len(lengths),
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        step_size=step_size,
        tokens_per_step=tokens_per_step,
        largest_micro_batch=largest,
        num_workers=config.num_workers,
        resources_per_worker=config.resources_per_worker or (None if on_cluster else _share_here(config, on_gpu)),
        compute_dtype=dtype,
        fsdp=config.fsdp,
        memory=estimate(llama_config, step, per_device),
        time=estimate_time(flops, config.max_workers) if on_gpu else None,
        device_memory=device_memory,
    )


def dry_run(config: TrainConfig, *, as_json: bool = False) -> str:
    """The resolved configuration and the plan, as YAML with comments or as JSON.

    Raises:
        CorralError: config, base, data or this machine do not fit.
    """
    if not os.environ.get("RAY_ADDRESS"):
        check_this_machine(config)
    inputs = read_inputs(config, weights=False)
    plan = make_plan(config, inputs)
    if as_json:
        return json.dumps({"config": dict(resolved(config)), "plan": plan.as_dict()}, indent=1)
    comments = "\n".join(f"# {line}" for line in str(plan).splitlines())
    return f"{yaml.safe_dump(dict(resolved(config)), sort_keys=False)}\n{comments}"


def memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """The parts of a `MemoryEstimate` in plain values, one per line."""
    parts = {
        "base in 4 bits": memory["base_4bit"],
        "embeddings, lm_head, norms": memory["base_other"],
        "adapter": memory["adapter"],
        "optimizer": memory["optimizer"],
        "gradients": memory["gradients"],
        f"activations ({memory['phase']})": memory["activations"],
        "workspace": memory["workspace"],
        "CUDA context" if memory["on_gpu"] else "Python and libraries": memory["context"],
    }
    lines = [f"{name:<28} {_gib(size)}" for name, size in parts.items() if size]
    if memory["paged"]:
        lines.append(f"{'optimizer, paged to the host':<28} {_gib(memory['paged'])} (not in the sum)")
    return lines


def _compute_dtype(config: TrainConfig, on_gpu: bool, gpu_here: bool) -> ComputeDtype:
    if on_gpu and not gpu_here:  # a cluster's GPU, assumed to support bfloat16 (2020 or later)
        return "bfloat16" if config.quantization.compute_dtype == "auto" else config.quantization.compute_dtype
    return compute_dtype_on("cuda" if on_gpu else "cpu", config.quantization)


def _share_here(config: TrainConfig, on_gpu: bool) -> dict[str, float]:
    cpus = max(1, (os.cpu_count() or 1) // config.max_workers)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if on_gpu else {})


def _device_memory(on_gpu: bool) -> int:
    if on_gpu:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
