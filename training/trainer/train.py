"""What one worker does in a run, top to bottom, in `train`; Ray is not known here.

The base in NF4, an adapter on it, the trainer of the method over rows that are tokenized already, the adapter saved,
and its held-out loss from the very files that will be published. Progress and checkpoints go to a `RunReporter`;
`training.ray_train.fit` connects that to Ray Train.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from training.base_models.nf4 import ComputeDtype, compute_dtype_on, load_quantized
from training.config.train_config import TrainConfig
from training.data.batch_sampler import StepBatchSampler, StepLayout, pack
from training.data.row_store import TokenizedRow
from training.data.run_inputs import RunInputs, read_inputs
from training.errors import TrainingError
from training.planning.batch_size import decide, free_memory
from training.trainer.callback import RunReporter, TrainingCallback
from training.trainer.evaluate import HeldOutResult, evaluate_files, held_out_loss
from training.trainer.fsdp_qlora import exclude_from_ddp, load_sharded
from training.trainer.qlora import load_adapter, start_adapter
from training.trainer.samples import SampleAnswer, sample_answers
from training.trainer.sft_trainer import PaddingFreeTrainer, neftune, training_forward


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        metrics: train_loss, train_s, num_steps, num_train_tokens; with held-out rows also eval_loss, base_eval_loss
            (mean over eval_tokens assistant tokens, in nats), both of the adapter as it was saved.
        samples: on rank 0, with `fsdp` on all.
        compute_dtype: what the base was computed in.
        adapter_sha256: of the weights file that was evaluated; None without held-out rows.
        changes: whether the adapter changes any output, as far as held-out rows tell.
    """

    metrics: dict[str, float]
    samples: list[SampleAnswer]
    compute_dtype: ComputeDtype
    adapter_sha256: str | None = None
    changes: bool = True


def train(
    config: TrainConfig,
    run: RunReporter,
    *,
    adapter_dir: Path,
    scratch_dir: Path,
    device: torch.device,
    resume_from: Path | None = None,
    parent_dir: Path | None = None,
) -> TrainResult:
    """Train one adapter and save it to `adapter_dir`, the same files on every rank.

    Args:
        scratch_dir: local, this rank's own; checkpoints are written here before `run` takes them.
        resume_from: a checkpoint that `run` was given earlier.
        parent_dir: the files of the adapter to go on from (`continue_from`).

    Raises:
        TrainingError: the loss became NaN or infinite, or exploded; naming the step.
        CorralError: base, chat format or data cannot be used.
    """
    inputs = read_inputs(config)
    config = _decided(config, inputs, device)
    run.on_phase(f"loading {inputs.base.name} in 4 bit")
    set_seed(config.seed)
    base = (load_sharded if config.fsdp else load_quantized)(inputs.base, config.quantization, device)
    model = start_adapter(base, config.lora, inputs.base.path, parent_dir)
    if config.fsdp:
        exclude_from_ddp(model)
    held_out = _held_out(config, inputs, model)
    before = {"parent_eval_loss": held_out.metrics(model)["eval_loss"]} if held_out and parent_dir else {}

    run.on_phase("training")
    watch = TrainingCallback(config, run, *_highest_loss(config, base), held_out.metrics if held_out else None)
    metrics = _fit(config, inputs, model, watch, scratch_dir, resume_from)
    model.eval()
    model.save_pretrained(str(adapter_dir), save_embedding_layers=False)
    samples: list[SampleAnswer] = []
    if config.sample_prompts and (run.rank == 0 or config.fsdp):
        run.on_phase("sample answers of base and adapter")
        samples = sample_answers(model, inputs, config.sample_prompts, with_all_ranks=config.fsdp)

    compute_dtype = compute_dtype_on(device, config.quantization)
    if held_out is None:
        return TrainResult(metrics, samples, compute_dtype)
    run.on_phase("held-out loss of base and adapter")
    model.unload()
    found = held_out.of_files(adapter_dir, base)
    return TrainResult(metrics | before | found.metrics, samples, compute_dtype, found.adapter_sha256, found.changes)


def _fit(
    config: TrainConfig,
    inputs: RunInputs,
    model: PeftModel,
    watch: TrainingCallback,
    scratch_dir: Path,
    resume_from: Path | None,
) -> dict[str, float]:
    """The steps; leaves the weights to publish in `model`."""
    if resume_from:
        watch.resume(resume_from)
        if watch.finished:  # a worker ended after its last checkpoint
            load_adapter(model, resume_from)
            return {**watch.last, "train_s": 0.0, "num_steps": float(watch.last_step), **watch.take_best(model)}
    trainer = _trainer(config, inputs, model, watch, scratch_dir)
    if trainer.accelerator.ddp_handler:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # otherwise each gradient is held twice
    started = time.monotonic()
    with ExitStack() as training:
        if config.method == "sft":
            training.enter_context(training_forward(model))
            training.enter_context(neftune(model, config.neftune_noise_alpha))
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    return {
        **watch.last,
        "train_s": time.monotonic() - started,
        "num_steps": float(trainer.state.global_step),
        **watch.take_best(model),
    }


def _trainer(
    config: TrainConfig, inputs: RunInputs, model: PeftModel, watch: TrainingCallback, scratch_dir: Path
) -> Trainer:
    batches, shape = step_batches(config, inputs, *_rank_and_world_size())
    arguments = training_arguments(config, model, scratch_dir, shape.accumulation)
    if config.method != "sft":
        from training.trainer.preference_trainer import preference_trainer

        trainer: Trainer = preference_trainer(config, inputs, model, batches, arguments, [watch])
        return trainer
    return PaddingFreeTrainer(
        model,
        TrainingArguments(**arguments),
        inputs.train_rows,
        batches,
        [watch],
        loraplus_lr_ratio=config.loraplus_lr_ratio,
    )


def step_batches(
    config: TrainConfig, inputs: RunInputs, rank: int, world_size: int
) -> tuple[StepBatchSampler, StepLayout]:
    """The micro-batches of worker `rank`; steps have the same examples for every `world_size`."""
    lengths = inputs.train_rows.lengths
    packs = pack(lengths, config.max_length) if config.packing else None
    num_examples = len(packs) if packs else len(lengths)
    shape = StepLayout(min(config.step_size, num_examples), world_size, config.micro_batch_size)
    if shape.step_size < world_size:
        raise TrainingError(
            f"{world_size} workers share steps of {shape.step_size} {'packs' if packs else 'rows'}: use fewer workers, "
            "larger steps or more data"
        )
    grouped = config.group_by_length
    return StepBatchSampler(lengths, packs, shape, rank, config.seed, group_by_length=grouped), shape


def training_arguments(config: TrainConfig, model: PeftModel, scratch_dir: Path, accumulation: int) -> dict[str, Any]:
    """What the trainer of any method is told, by the names of transformers' TrainingArguments."""
    on_cpu = model.device.type == "cpu"
    dtype = compute_dtype_on(model.device, config.quantization)
    return {
        "output_dir": str(scratch_dir),
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps if config.warmup_steps < 1 else int(config.warmup_steps),
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "gradient_checkpointing": config.gradient_checkpointing is True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": config.seed,
        "use_cpu": on_cpu,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,  # every step is checked for divergence
        "logging_nan_inf_filter": False,
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def _decided(config: TrainConfig, inputs: RunInputs, device: torch.device) -> TrainConfig:
    """`config` with numbers in place of `auto`: the same on every rank, so those of the device with least room."""
    _, num_workers = _rank_and_world_size()
    decided = decide(
        config,
        inputs,
        free_memory(device, num_workers),
        on_gpu=device.type == "cuda",
        compute_dtype=compute_dtype_on(device, config.quantization),
    )
    if num_workers == 1:
        return decided
    least = torch.tensor([decided.micro_batch_size, int(not decided.gradient_checkpointing)], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    batch, without = least.tolist()
    return decided.model_copy(update={"per_device_train_batch_size": batch, "gradient_checkpointing": not without})


class _HeldOut(Protocol):
    """Held-out rows, and what an adapter makes of them."""

    def metrics(self, model: PeftModel) -> dict[str, float]:
        """Of the adapter on `model`; `eval_loss` among them."""

    def of_files(self, adapter_dir: Path, base: LlamaForCausalLM) -> HeldOutResult:
        """Of the adapter in `adapter_dir`, loaded from its files."""


@dataclass(frozen=True, slots=True)
class _HeldOutConversations:
    rows: Sequence[TokenizedRow]

    def metrics(self, model: PeftModel) -> dict[str, float]:
        return {"eval_loss": held_out_loss(model, self.rows)[0]}

    def of_files(self, adapter_dir: Path, base: LlamaForCausalLM) -> HeldOutResult:
        return evaluate_files(adapter_dir, base, self.rows)


def _held_out(config: TrainConfig, inputs: RunInputs, model: PeftModel) -> _HeldOut | None:
    """To be asked before the first step: the adapter may be what later ones are compared with."""
    model.eval()
    if not len(inputs.held_out_rows):
        return None
    if config.method == "sft":
        return _HeldOutConversations(inputs.held_out_rows)
    from training.trainer.preference_losses import HeldOutPreferences

    return HeldOutPreferences(model, config.preference, inputs.held_out_rows)


def _highest_loss(config: TrainConfig, base: LlamaForCausalLM) -> tuple[float, str]:
    """The loss above which a step has diverged, and what that is."""
    if config.method == "sft":
        return 2 * math.log(base.config.vocab_size), "twice that of blind guessing"
    from training.trainer.preference_losses import loss_at_reference

    start = loss_at_reference(config.preference, config.method)
    return 10 * start, f"ten times the {start:.2f} that it started from"


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
