"""Supervised fine-tuning: what one worker does, top to bottom, in `train`.

Base in NF4, adapter on it, TRL's SFTTrainer over rows that are already tokenized, held-out loss of base and adapter,
sample answers, and the adapter saved. Progress and checkpoints go to a `Run`; `training.fit` connects that to Ray,
which this module does not know.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from training.base_models import ComputeDtype, compute_dtype_on, load_quantized
from training.chat_format import Message
from training.config import TrainConfig
from training.data import IGNORED_LABEL, TokenizedRow
from training.errors import TrainingError
from training.inputs import RunInputs, read_inputs
from training.qlora import adapters_to_float32, exact_adapters, start_adapter

if TYPE_CHECKING:
    from training.preferences import PreferenceRows

_EVAL_BATCH_TOKENS = 2048  # padded tokens in one forward of the held-out evaluation
_SAMPLE_TOKENS = 64
_BUCKET_BATCHES = 8  # rows are sorted by length within so many batches, so that little is padded


class Run(Protocol):
    """Where a worker's progress goes. Every rank calls every method at the same step."""

    @property
    def rank(self) -> int:
        """0 is the worker that writes files."""

    def on_phase(self, phase: str) -> None:
        """`phase` begins, in words for the person who waits."""

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Optimizer step `step` of `num_steps` is done; `metrics` has loss, learning_rate, tokens_per_s and others."""

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        """`directory` holds this rank's part of a checkpoint until the call returns."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt, the answer in the dataset, and what base and adapter say (greedy)."""

    prompt: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True, slots=True)
class SftResult:
    """What a finished run leaves.

    Attributes:
        metrics: train_loss, train_s, num_steps, num_train_tokens; with held-out rows also eval_loss, base_eval_loss
            (mean over eval_tokens assistant tokens, in nats) and parent_eval_loss where there is a parent; for dpo and
            kto what `HeldOutPreferences.metrics` has.
        samples: on rank 0 only.
        compute_dtype: what the base was computed in.
    """

    metrics: dict[str, float]
    samples: list[Sample]
    compute_dtype: ComputeDtype


def train(
    config: TrainConfig,
    run: Run,
    *,
    adapter_dir: Path,
    scratch_dir: Path,
    device: torch.device,
    resume_from: Path | None = None,
    parent_dir: Path | None = None,
) -> SftResult:
    """Train one adapter and save it to `adapter_dir` (rank 0).

    Args:
        scratch_dir: local, this rank's own; checkpoints are written here before `run` takes them.
        resume_from: a checkpoint that `run` was given earlier, all ranks' parts in one directory.
        parent_dir: the files of the adapter to go on from (`continue_from`).

    Raises:
        TrainingError: the loss became NaN or infinite, or exploded; naming the step.
        CorralError: base, chat format or data cannot be used.
    """
    inputs = read_inputs(config)
    run.on_phase(f"loading {inputs.base.name} in 4 bit")
    set_seed(config.seed)
    base = load_quantized(inputs.base, config.quantization, device)
    model = start_adapter(base, config.lora, parent_dir)
    held_out = _held_out(config, inputs, model, parent_dir) if inputs.held_out_rows else None

    run.on_phase("training")
    watch = _Watch(config, run, vocab_size=base.config.vocab_size)
    trainer = _trainer(config, inputs, model, watch, scratch_dir)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    metrics = {
        **watch.last,
        "train_s": time.monotonic() - started,
        "num_steps": float(trainer.state.global_step),
    }
    del trainer
    model.eval()

    if held_out:
        run.on_phase("held-out loss of base and adapter")
        metrics |= held_out(model)
    samples: list[Sample] = []
    if run.rank == 0:
        model.save_pretrained(str(adapter_dir), save_embedding_layers=False)
        if inputs.held_out and config.sample_prompts:
            run.on_phase("sample answers of base and adapter")
            samples = _sample_answers(model, inputs, config.sample_prompts)
    return SftResult(metrics, samples, compute_dtype_on(device, config.quantization))


def _held_out(
    config: TrainConfig, inputs: RunInputs, model: PeftModel, parent_dir: Path | None
) -> Callable[[PeftModel], dict[str, float]]:
    """What measures the adapter on the held-out rows after training; what it is compared with is measured here."""
    if config.method != "sft":
        from training.preferences import HeldOutPreferences

        return HeldOutPreferences(model, config.preference, cast("PreferenceRows", inputs.held_out_rows)).metrics
    rows = cast("list[TokenizedRow]", inputs.held_out_rows)
    model.eval()
    parent = {"parent_eval_loss": held_out_loss(model, rows)[0]} if parent_dir else {}

    def metrics(model: PeftModel) -> dict[str, float]:
        loss, num_tokens = held_out_loss(model, rows)
        with model.disable_adapter():
            base_loss, _ = held_out_loss(model, rows)
        return {"eval_loss": loss, "eval_tokens": num_tokens, "base_eval_loss": base_loss, **parent}

    return metrics


@torch.no_grad()
def held_out_loss(model: PeftModel, rows: Sequence[TokenizedRow]) -> tuple[float, float]:
    """Mean cross entropy over the labelled tokens of `rows`, and how many there are; ranks share the work.

    Every token counts the same, whatever batch it is in. Computed in the base's dtype, without autocast, as in serving.
    """
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, LlamaForCausalLM)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, number of tokens
    for batch in _eval_batches(rows[rank::world_size]):
        input_ids = _padded([row["input_ids"] for row in batch], 0, model.device)
        labels = _padded([row["labels"] for row in batch], IGNORED_LABEL, model.device)[:, 1:]
        # Padding is on the right, where causal attention does not look: no mask is needed.
        hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        labelled = labels != IGNORED_LABEL
        logits = causal_lm.lm_head(hidden[labelled]).float()  # [labelled tokens, vocabulary]
        total[0] += F.cross_entropy(logits, labels[labelled], reduction="sum").item()
        total[1] += int(labelled.sum())
    if world_size > 1:
        total = total.to(model.device)
        dist.all_reduce(total)
    return float(total[0] / total[1]), float(total[1])


class LengthBucketSampler(Sampler[int]):
    """A fresh order in every epoch in which rows of like length are neighbours; set by seed and epoch alone.

    Nothing else is drawn from, so a resumed run sees the rows in the order of the uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        bucket = _BUCKET_BATCHES * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            rows = sorted(order[start : start + bucket], key=lambda row: self._lengths[row])
            batches += [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        short = [batch for batch in batches if len(batch) < self._batch_size]  # at most one; it has to come last
        full = [batch for batch in batches if len(batch) == self._batch_size]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from full[index]
        for batch in short:
            yield from batch


class _Trainer(SFTTrainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBucketSampler:
        rows: Any = self.train_dataset
        lengths = [len(input_ids) for input_ids in rows["input_ids"]]
        return LengthBucketSampler(lengths, self.args.train_batch_size, self.args.seed)


class _Watch(TrainerCallback):
    """Passes logs and checkpoints on, and stops a run that diverged."""

    def __init__(self, config: TrainConfig, run: Run, vocab_size: int) -> None:
        self.last: dict[str, float] = {}
        self._config = config
        self._run = run
        if config.method == "sft":
            self._highest_loss, self._compared = 2 * math.log(vocab_size), "twice that of blind guessing"
        else:
            from training.preferences import loss_at_reference

            start = loss_at_reference(config.preference, config.method)
            self._highest_loss, self._compared = 10 * start, f"ten times the {start:.2f} that it started from"
        self._seen_tokens, self._seen_at = 0.0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        adapters_to_float32(model)
        self._seen_at = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._check(state.global_step, loss, grad_norm)
        now, tokens = time.monotonic(), float(logs["num_tokens"])
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(logs["learning_rate"]),
            "epoch": float(logs["epoch"]),
            "num_tokens": tokens,
            "tokens_per_s": (tokens - self._seen_tokens) / max(now - self._seen_at, 1e-6),
            **{key: float(value) for key, value in logs.items() if key.startswith("rewards/")},
        }
        self.last = {"train_loss": loss, "num_train_tokens": tokens}
        if state.global_step % self._config.logging_steps == 0 or state.global_step == state.max_steps:
            self._run.on_log(state.global_step, state.max_steps, metrics)
            self._seen_tokens, self._seen_at = tokens, now

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._run.on_checkpoint(directory, state.global_step, self.last)

    def _check(self, step: int, loss: float, grad_norm: float) -> None:
        advice = (
            f"lower learning_rate ({self._config.learning_rate:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
        )
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            what, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise TrainingError(f"training stopped at step {step}: the {what} became {value}: {advice}")
        if loss > self._highest_loss:
            raise TrainingError(
                f"training stopped at step {step}: the loss rose to {loss:.1f}, {self._compared}: {advice}"
            )


def _trainer(config: TrainConfig, inputs: RunInputs, model: PeftModel, watch: _Watch, scratch_dir: Path) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(inputs.base.path, local_files_only=True)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # On CUDA, TRL projects only labelled positions onto the vocabulary; on the CPU too it pays.
    setattr(trl_utils, "_use_triton", lambda device: device.type in ("cuda", "cpu"))  # noqa: B010
    trainer: Trainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers is about to change
        arguments = _training_arguments(config, model, scratch_dir)
        if config.method != "sft":
            from training.preference_trainer import preference_trainer

            rows = cast("PreferenceRows", inputs.train_rows)
            trainer = preference_trainer(
                config, model, rows, arguments=arguments, tokenizer=tokenizer, callbacks=[watch]
            )
        else:
            with exact_adapters(model):
                trainer = _Trainer(
                    model=model,
                    args=SFTConfig(
                        **arguments,
                        dataset_kwargs={"skip_prepare_dataset": True},
                        max_length=None,  # rows are checked before
                    ),
                    train_dataset=Dataset.from_list([dict(row) for row in inputs.train_rows]),
                    processing_class=tokenizer,
                    data_collator=DataCollatorForLanguageModeling(pad_token_id=pad_token_id),
                    callbacks=[watch],
                )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(config: TrainConfig, model: PeftModel, scratch_dir: Path) -> dict[str, Any]:
    """What every method's trainer is told, by the names of transformers' TrainingArguments."""
    on_cpu = model.device.type == "cpu"
    dtype = compute_dtype_on(model.device, config.quantization)
    return {
        "output_dir": str(scratch_dir),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps if config.warmup_steps < 1 else int(config.warmup_steps),
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seed": config.seed,
        "use_cpu": on_cpu,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,  # every step is checked for divergence
        "logging_nan_inf_filter": False,
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def _eval_batches(rows: Sequence[TokenizedRow]) -> Iterator[list[TokenizedRow]]:
    batch: list[TokenizedRow] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if batch and len(row["input_ids"]) * (len(batch) + 1) > _EVAL_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    pads = [[value] * (width - len(row)) for row in rows]
    filled = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    return torch.tensor(filled, device=device)


def _sample_answers(model: PeftModel, inputs: RunInputs, num_prompts: int) -> list[Sample]:
    """Greedy answers to the first question of up to `num_prompts` held-out conversations, spread over them."""
    chosen = inputs.held_out[:: max(1, len(inputs.held_out) // num_prompts)][:num_prompts]
    firsts = [next(i for i, m in enumerate(c.messages) if m.role == "assistant") for c in chosen]
    dialogs = [conversation.messages[:first] for conversation, first in zip(chosen, firsts, strict=True)]
    adapter = generate_answers(model, inputs, dialogs)
    with model.disable_adapter():
        base = generate_answers(model, inputs, dialogs)
    return [
        Sample(conversation.messages[first - 1].content, conversation.messages[first].content, b, a)
        for conversation, first, b, a in zip(chosen, firsts, base, adapter, strict=True)
    ]


@torch.no_grad()
def generate_answers(
    model: PeftModel, inputs: RunInputs, dialogs: Sequence[Sequence[Message]], max_tokens: int = _SAMPLE_TOKENS
) -> list[str]:
    """Greedy answers to `dialogs`, in one batch."""
    prompts = [inputs.chat_format.render_prompt(dialog) for dialog in dialogs]
    stop_ids = list(inputs.chat_format.stop_token_ids)
    attention_mask = _padded([[1] * len(prompt) for prompt in prompts], 0, model.device, left=True)
    causal_lm: Any = model
    generated = causal_lm.generate(
        input_ids=_padded(prompts, stop_ids[0], model.device, left=True),
        attention_mask=attention_mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    answers = []
    for ids in generated[:, attention_mask.shape[1] :].tolist():
        end = next((i for i, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
        answers.append(inputs.tokenizer.decode(ids[:end]).strip())
    return answers
