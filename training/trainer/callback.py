"""The trainer callback of a run: metrics, checkpoints, divergence checks, held-out loss, early stopping.

`TrainingCallback` works with the trainer of any method; its `RunReporter` decides where progress and checkpoints go.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.config.train_config import TrainConfig
from training.errors import TrainingError
from training.trainer.qlora import adapters_to_float32

_STATE_FILE, _BEST_WEIGHTS_FILE = "watch.json", "best.safetensors"  # in a checkpoint
# torch's GradScaler starts at 2^16 and halves for each step whose float16 gradients overflowed.
_SCALER_HALVINGS = 16


class RunReporter(Protocol):
    """Receives a worker's progress. Every rank calls every method at the same step."""

    @property
    def rank(self) -> int:
        """Rank 0 writes the files."""

    def on_phase(self, phase: str) -> None:
        """`phase` begins; a description for the user."""

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Optimizer step `step` of `num_steps` is complete; `metrics` has loss, grad_norm, learning_rate, epoch,
        num_tokens (so far), tokens_per_s, samples_per_s (rows or packs), peak_memory_bytes, and eval_loss if it was
        computed at this step."""

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        """On rank 0, `directory` has a complete checkpoint until the call returns; other ranks' files are ignored."""


class TrainingCallback(TrainerCallback):
    """Stops a run that diverges or no longer improves, and keeps the adapter weights with the lowest held-out loss.

    Args:
        max_loss: a step with a loss above this has diverged.
        max_loss_description: what `max_loss` is, for the error message.
        evaluate: returns the held-out metrics of a model, including `eval_loss`; every rank calls it at the same steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: RunReporter,
        max_loss: float,
        max_loss_description: str,
        evaluate: Callable[[PeftModel], Mapping[str, float]] | None = None,
    ) -> None:
        self.last_metrics: dict[str, float] = {}
        self.last_step = 0
        self.finished = False  # no steps remain: all were taken, or the run stopped early
        self._config, self._reporter, self._evaluate = config, reporter, evaluate
        self._max_loss, self._max_loss_description = max_loss, max_loss_description
        self._eval_metrics: dict[str, float] = {}  # of the current step
        self._best_step, self._best_loss, self._best_weights = 0, math.inf, dict[str, torch.Tensor]()
        self._misses = 0  # consecutive evaluations without an improvement
        self._loss_to_beat = math.inf
        self._overflows = 0  # consecutive steps that the GradScaler skipped
        self._logged_tokens, self._logged_step, self._logged_at = 0.0, 0, time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Restore the state that was saved with `checkpoint`."""
        state = json.loads((checkpoint / _STATE_FILE).read_text())
        self.last_step, self.finished, self.last_metrics = state["step"], state["finished"], state["last"]
        self._best_step, self._best_loss = state["best_step"], state["best_loss"]
        self._misses, self._loss_to_beat = state["misses"], state["to_beat"]
        if (checkpoint / _BEST_WEIGHTS_FILE).exists():
            self._best_weights = load_file(checkpoint / _BEST_WEIGHTS_FILE)

    def restore_best(self, model: PeftModel) -> dict[str, float]:
        """Load the weights with the lowest held-out loss into `model`, if they were kept; returns `best_step`."""
        if not self._best_weights:
            return {}
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(self._best_weights[name])
        return {"best_step": float(self._best_step)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        adapters_to_float32(model)  # a resumed adapter may be in another dtype
        self._logged_tokens, self._logged_step = float(state.num_input_tokens_seen), state.global_step
        self._logged_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        interval, is_last = self._config.eval_steps, state.global_step == state.max_steps
        if self._evaluate is None or interval is None or (state.global_step % interval and not is_last):
            return
        started = time.monotonic()
        model.eval()
        self._eval_metrics = dict(self._evaluate(model))
        model.train()
        self._logged_at += time.monotonic() - started
        self._update_best(state.global_step, self._eval_metrics["eval_loss"], model)
        patience = self._config.early_stopping_patience
        if patience is not None and self._misses >= patience:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the final summary
            return
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._check_divergence(state.global_step, loss, grad_norm, args)
        now, tokens = time.monotonic(), float(logs.get("num_tokens", state.num_input_tokens_seen))
        elapsed_s = max(now - self._logged_at, 1e-6)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(logs["learning_rate"]),
            "epoch": float(logs["epoch"]),
            "num_tokens": tokens,
            "tokens_per_s": (tokens - self._logged_tokens) / elapsed_s,
            "samples_per_s": (state.global_step - self._logged_step) * self._config.step_size / elapsed_s,
            "peak_memory_bytes": float(_peak_memory_bytes()),
            **{key: float(value) for key, value in logs.items() if key.startswith("rewards/")},
            **self._eval_metrics,
        }
        self.last_metrics, self.last_step = {"train_loss": loss, "num_train_tokens": tokens}, state.global_step
        self.finished = state.global_step == state.max_steps or control.should_training_stop
        if state.global_step % self._config.logging_steps == 0 or self._eval_metrics or self.finished:
            self._reporter.on_log(state.global_step, state.max_steps, metrics)
            self._logged_tokens, self._logged_step, self._logged_at = tokens, state.global_step, now
            self._eval_metrics = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._reporter.rank == 0:
            own_state = {
                "step": self.last_step, "finished": self.finished, "last": self.last_metrics,
                "best_step": self._best_step, "best_loss": self._best_loss, "misses": self._misses,
                "to_beat": self._loss_to_beat,
            }  # fmt: skip
            (directory / _STATE_FILE).write_text(json.dumps(own_state))
            if self._best_weights:
                save_file(self._best_weights, directory / _BEST_WEIGHTS_FILE)
        self._reporter.on_checkpoint(directory, state.global_step, self.last_metrics)

    def _update_best(self, step: int, loss: float, model: PeftModel) -> None:
        if loss < self._best_loss:
            self._best_step, self._best_loss = step, loss
            if self._config.load_best_model_at_end:
                self._best_weights = {n: p.detach().cpu().clone() for n, p in _trainable(model).items()}
        if loss < self._loss_to_beat - self._config.early_stopping_threshold:
            self._loss_to_beat, self._misses = loss, 0
        else:
            self._misses += 1

    def _check_divergence(self, step: int, loss: float, grad_norm: float, args: TrainingArguments) -> None:
        advice = (
            f"lower learning_rate ({self._config.learning_rate:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
        )
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        skipped = args.fp16 and self._overflows <= _SCALER_HALVINGS
        if not math.isfinite(loss) or (self._overflows and not skipped):
            quantity, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise TrainingError(f"training stopped at step {step}: the {quantity} became {value}: {advice}")
        if loss > self._max_loss:
            raise TrainingError(
                f"training stopped at step {step}: the loss rose to {loss:.1f}, more than "
                f"{self._max_loss_description}: {advice}"
            )


def _peak_memory_bytes() -> int:
    """The peak memory of this process: on its GPU, or in RAM if it uses none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
