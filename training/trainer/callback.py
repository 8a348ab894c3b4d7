"""A run while it trains: logs and checkpoints reported, divergence, held-out loss, early stopping.

`TrainingCallback` works with the trainer of any method; where progress and checkpoints go is up to its `RunReporter`.
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

_WATCH_FILE, _BEST_WEIGHTS_FILE = "watch.json", "best.safetensors"  # in a checkpoint
_SCALER_HALVINGS = 16  # of torch's GradScaler from 2^16 down to 1, each for a step whose float16 gradients overflowed


class RunReporter(Protocol):
    """Where a worker's progress goes. Every rank calls every method at the same step."""

    @property
    def rank(self) -> int:
        """0 is the worker that writes files."""

    def on_phase(self, phase: str) -> None:
        """`phase` begins, in words for the person who waits."""

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Optimizer step `step` of `num_steps` is done; `metrics` has loss, grad_norm, learning_rate, epoch,
        num_tokens (so far), tokens_per_s, samples_per_s (rows or packs), peak_memory_bytes, and eval_loss where it was
        computed at this step."""

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Rank 0 has a whole checkpoint in `directory` until the call returns; what other ranks have does not count."""


class TrainingCallback(TrainerCallback):
    """Stops a run that diverged or no longer improves, and keeps the adapter of the lowest held-out loss.

    Args:
        highest_loss: a step's loss above this is divergence; `compared` says what it is compared with.
        evaluate: the held-out figures of a model, `eval_loss` among them; every rank calls it at the same steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunReporter,
        highest_loss: float,
        compared: str,
        evaluate: Callable[[PeftModel], Mapping[str, float]] | None = None,
    ) -> None:
        self.last: dict[str, float] = {}
        self.last_step = 0
        self.finished = False  # no step is left: the run took all, or stopped early
        self._config, self._run, self._evaluate = config, run, evaluate
        self._highest_loss, self._compared = highest_loss, compared
        self._evaluated: dict[str, float] = {}  # of the present step
        self._best_step, self._best_loss, self._best_weights = 0, math.inf, dict[str, torch.Tensor]()
        self._misses = 0  # evaluations since the last that counted as better
        self._to_beat = math.inf
        self._overflows = 0  # steps in a row that the GradScaler skipped
        self._seen_tokens, self._seen_step, self._seen_at = 0.0, 0, time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Take up what an earlier worker knew at this checkpoint."""
        known = json.loads((checkpoint / _WATCH_FILE).read_text())
        self.last_step, self.finished, self.last = known["step"], known["finished"], known["last"]
        self._best_step, self._best_loss = known["best_step"], known["best_loss"]
        self._misses, self._to_beat = known["misses"], known["to_beat"]
        if (checkpoint / _BEST_WEIGHTS_FILE).exists():
            self._best_weights = load_file(checkpoint / _BEST_WEIGHTS_FILE)

    def take_best(self, model: PeftModel) -> dict[str, float]:
        """Give `model` the weights of the lowest held-out loss, where they were kept; returns `best_step`."""
        if not self._best_weights:
            return {}
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(self._best_weights[name])
        return {"best_step": float(self._best_step)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        adapters_to_float32(model)  # a resumed adapter may have come back in another dtype
        self._seen_tokens, self._seen_step = float(state.num_input_tokens_seen), state.global_step
        self._seen_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        every, is_last = self._config.eval_steps, state.global_step == state.max_steps
        if self._evaluate is None or every is None or (state.global_step % every and not is_last):
            return
        started = time.monotonic()
        model.eval()
        self._evaluated = dict(self._evaluate(model))
        model.train()
        self._seen_at += time.monotonic() - started
        self._compare(state.global_step, self._evaluated["eval_loss"], model)
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
        if not logs or "loss" not in logs:  # the summary at the end
            return
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._check(state.global_step, loss, grad_norm, args)
        now, tokens = time.monotonic(), float(logs.get("num_tokens", state.num_input_tokens_seen))
        passed_s = max(now - self._seen_at, 1e-6)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(logs["learning_rate"]),
            "epoch": float(logs["epoch"]),
            "num_tokens": tokens,
            "tokens_per_s": (tokens - self._seen_tokens) / passed_s,
            "samples_per_s": (state.global_step - self._seen_step) * self._config.step_size / passed_s,
            "peak_memory_bytes": float(_peak_memory_bytes()),
            **{key: float(value) for key, value in logs.items() if key.startswith("rewards/")},
            **self._evaluated,
        }
        self.last, self.last_step = {"train_loss": loss, "num_train_tokens": tokens}, state.global_step
        self.finished = state.global_step == state.max_steps or control.should_training_stop
        if state.global_step % self._config.logging_steps == 0 or self._evaluated or self.finished:
            self._run.on_log(state.global_step, state.max_steps, metrics)
            self._seen_tokens, self._seen_step, self._seen_at = tokens, state.global_step, now
            self._evaluated = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._run.rank == 0:
            known = {
                "step": self.last_step, "finished": self.finished, "last": self.last, "best_step": self._best_step,
                "best_loss": self._best_loss, "misses": self._misses, "to_beat": self._to_beat,
            }  # fmt: skip
            (directory / _WATCH_FILE).write_text(json.dumps(known))
            if self._best_weights:
                save_file(self._best_weights, directory / _BEST_WEIGHTS_FILE)
        self._run.on_checkpoint(directory, state.global_step, self.last)

    def _compare(self, step: int, loss: float, model: PeftModel) -> None:
        if loss < self._best_loss:
            self._best_step, self._best_loss = step, loss
            if self._config.load_best_model_at_end:
                self._best_weights = {n: p.detach().cpu().clone() for n, p in _trainable(model).items()}
        if loss < self._to_beat - self._config.early_stopping_threshold:
            self._to_beat, self._misses = loss, 0
        else:
            self._misses += 1

    def _check(self, step: int, loss: float, grad_norm: float, args: TrainingArguments) -> None:
        advice = (
            f"lower learning_rate ({self._config.learning_rate:g}) or max_grad_norm ({self._config.max_grad_norm:g})"
        )
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        skipped = args.fp16 and self._overflows <= _SCALER_HALVINGS
        if not math.isfinite(loss) or (self._overflows and not skipped):
            what, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise TrainingError(f"training stopped at step {step}: the {what} became {value}: {advice}")
        if loss > self._highest_loss:
            raise TrainingError(
                f"training stopped at step {step}: the loss rose to {loss:.1f}, {self._compared}: {advice}"
            )


def _peak_memory_bytes() -> int:
    """The most that this process held on its GPU, or in memory where it uses none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
