"""`python -m training.bench`: one recipe trained by TRL alone, by Corral's loop without Ray, and by Corral on Ray.

Each of the three runs in its own process; they are interleaved in one-second slices, and have the same rows, batch
size, learning rate and NF4 base. TRL keeps its defaults for the rest. Only the time of the steps is compared, without
loading and evaluation. The last line of the output is JSON.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.bench.time_slicing import run_interleaved
from training.config.load import load_config
from training.config.train_config import TrainConfig
from training.runs.metrics_log import PhaseLog
from training.runs.run_dir import RunDir

_WAYS = {"trl": "TRL alone", "loop": "Corral without Ray", "ray": "Corral on Ray"}


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One training run: the time of its steps, their examples and tokens (without padding), and the held-out loss."""

    train_s: float
    num_examples: int
    num_tokens: float
    eval_loss: float
    total_s: float  # with imports, loading, evaluation and the start of Ray


def run_bench(config: TrainConfig, ways: Sequence[str], num_rounds: int) -> dict[str, list[TimedRun]]:
    """Train `num_rounds` times each way, with a different seed in each round, and print each result."""
    results: dict[str, list[TimedRun]] = {way: [] for way in ways}
    for number in range(num_rounds):
        round_config = config.model_copy(update={"seed": config.seed + number})
        for way, run in _run_round(round_config, ways).items():
            results[way].append(run)
            rate = run.num_examples / run.train_s
            print(f"round {number + 1}: {_WAYS[way]:<18} {run.train_s:6.1f} s  {rate:5.1f} examples/s", flush=True)
    return results


def compare(results: Mapping[str, Sequence[TimedRun]]) -> dict[str, Any]:
    """Compare the ways round by round: the medians of time ratios, and mean and standard error of loss differences."""

    def pairs(first: str, second: str) -> list[tuple[TimedRun, TimedRun]]:
        return list(zip(results[first], results[second], strict=True))

    comparison: dict[str, Any] = {}
    if {"trl", "loop"} <= results.keys():
        comparison["speedup_vs_trl"] = statistics.median(a.train_s / b.train_s for a, b in pairs("trl", "loop"))
        losses = [b.eval_loss - a.eval_loss for a, b in pairs("trl", "loop")]
        comparison["eval_loss_vs_trl"] = statistics.mean(losses)
        if len(losses) > 1:  # row order and initial weights differ: one round means little
            comparison["eval_loss_vs_trl_stderr"] = statistics.stdev(losses) / math.sqrt(len(losses))
    if {"loop", "ray"} <= results.keys():
        comparison["ray_overhead"] = statistics.median(b.train_s / a.train_s - 1 for a, b in pairs("loop", "ray"))
    rounded = {name: round(value, 4) for name, value in comparison.items()}
    runs = next(iter(results.values()))
    return {**rounded, "num_examples": runs[0].num_examples, "num_rounds": len(runs)}


def print_table(results: Mapping[str, Sequence[TimedRun]]) -> None:
    """Print the medians of every way."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "steps, s", "examples/s", "tokens/s", "held-out loss", "total, s", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for way, runs in results.items():
        train_s = statistics.median(run.train_s for run in runs)
        table.add_row(
            _WAYS[way],
            f"{train_s:.1f}",
            f"{runs[0].num_examples / train_s:.1f}",
            f"{runs[0].num_tokens / train_s:.0f}",
            f"{statistics.median(run.eval_loss for run in runs):.3f}",
            f"{statistics.median(run.total_s for run in runs):.0f}",
        )
    Console(width=100, highlight=False).print(table)


def _run_round(config: TrainConfig, ways: Sequence[str]) -> dict[str, TimedRun]:
    with tempfile.TemporaryDirectory() as scratch:

        def phase_starts(way: str) -> dict[str, float]:
            phases = RunDir(scratch, way).read_json(PhaseLog.FILE) or []
            return {phase["phase"]: phase["time"] for phase in phases}

        def is_training(way: str) -> bool:
            return "training" in phase_starts(way)

        command = [sys.executable, "-m", "training.bench", "--scratch", scratch]
        configs = {way: config.model_copy(update={"storage_path": scratch, "run_name": way}) for way in ways}
        commands = {way: [*command, "--way", way, "--json-config", configs[way].model_dump_json()] for way in ways}
        try:
            finished = run_interleaved(commands, is_training)
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from error
        runs = {}
        for way, (process, stdout) in finished.items():
            fields = json.loads(stdout.splitlines()[-1])
            starts = phase_starts(way)
            end = min(start for start in starts.values() if start > starts["training"])
            # The wall-clock time contains the slices of the other processes.
            fields["train_s"] = process.active_s(end - fields["train_s"], end)
            runs[way] = TimedRun(**fields, total_s=process.active_s(0, math.inf))
        return runs


def _train(config: TrainConfig, way: str, scratch: Path) -> dict[str, float]:
    """Train one way; returns the fields of `TimedRun` without `total_s`, and with `train_s` in wall-clock time."""
    if way == "ray":
        metrics = _train_on_ray(config)
    else:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        metrics = (_train_with_trl if way == "trl" else _train_without_ray)(
            config, _PhaseReporter(RunDir(scratch, way)), scratch / way
        )
    from training.data.run_inputs import read_inputs

    num_rows = len(read_inputs(config).train_rows)
    num_steps, step_size = int(metrics["num_steps"]), config.step_size
    epoch_steps = -(-num_rows // step_size)
    num_epochs, remaining_steps = divmod(num_steps, epoch_steps)
    return {
        "train_s": metrics["train_s"],
        "num_examples": num_epochs * num_rows + min(remaining_steps * step_size, num_rows),
        "num_tokens": metrics["num_train_tokens"],
        "eval_loss": metrics["eval_loss"],
    }


def _train_on_ray(config: TrainConfig) -> dict[str, float]:
    from training.ray_train.fit import fit

    return fit(config).metrics


class _PhaseReporter:
    """A `training.trainer.callback.RunReporter` that records only when phases start."""

    rank = 0

    def __init__(self, run_dir: RunDir) -> None:
        self._log = PhaseLog(run_dir)

    def on_phase(self, phase: str) -> None:
        self._log.add(phase)

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None: ...

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None: ...


def _train_without_ray(config: TrainConfig, reporter: _PhaseReporter, scratch: Path) -> dict[str, float]:
    import torch

    from training.trainer.train import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train(
        config, reporter, adapter_dir=scratch / "adapter", scratch_dir=scratch / "checkpoints", device=device
    ).metrics


def _train_with_trl(config: TrainConfig, reporter: _PhaseReporter, scratch: Path) -> dict[str, float]:
    """SFTTrainer as in its documentation, over rows that are already tokenized and masked."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from training.base_models.nf4 import forbid_packed_cpu_kernel, load_quantized
    from training.data.run_inputs import read_inputs
    from training.trainer.evaluate import held_out_loss

    inputs = read_inputs(config)
    on_gpu = torch.cuda.is_available()
    base = load_quantized(inputs.base, config.quantization, "cuda" if on_gpu else "cpu")
    forbid_packed_cpu_kernel(base)  # it loses the gradient through the base after an evaluation
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=config.lora.targets,
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=config.step_size,
        max_steps=config.max_steps,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        seed=config.seed,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=config.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in inputs.train_rows]),
        processing_class=AutoTokenizer.from_pretrained(inputs.base.path, local_files_only=True),
        peft_config=lora,
    )
    reporter.on_phase("training")
    started = time.monotonic()
    trainer.train()
    train_s = time.monotonic() - started
    reporter.on_phase("held-out loss")
    trainer.model.eval()
    loss, _ = held_out_loss(trainer.model, inputs.held_out_rows)
    token_counts = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    return {
        "train_s": train_s,
        "num_steps": trainer.state.global_step,
        "num_train_tokens": float(token_counts[-1]),
        "eval_loss": loss,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.bench", description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", default="configs/train/quickstart.yaml", help="a training YAML")
    parser.add_argument("--rounds", type=int, default=3, help="how many times each trains")
    parser.add_argument("--ways", default=",".join(_WAYS), help="which of them to run, such as loop,ray")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_steps=46; default: one epoch")
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json-config", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.way:
        print(json.dumps(_train(TrainConfig.model_validate_json(args.json_config), args.way, args.scratch)))
        return 0
    overrides = ["num_train_epochs=1", "sample_prompts=0", "report_to=[]", "save_steps=1000000", *args.overrides]
    ways = [way for way in _WAYS if way in args.ways.split(",")]
    results = run_bench(load_config(args.config, overrides), ways, args.rounds)
    print_table(results)
    print(json.dumps(compare(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
