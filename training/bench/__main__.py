"""`python -m training.bench`: one recipe trained by TRL alone, by Corral's loop without Ray, and by Corral on Ray.

The three take turns of a second, each in a process of its own, on the same rows with the same batch size, learning
rate and NF4 base; TRL has its own defaults for the rest. What counts is the time of the steps, without loading and
evaluating. `make bench-train` runs it; its last line is JSON.
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
class Timed:
    """One training: its steps' seconds, examples and tokens (padding left out), and the held-out loss after it."""

    train_s: float
    num_examples: int
    num_tokens: float
    eval_loss: float
    whole_s: float  # with imports, loading, evaluation and the start of Ray


def run_bench(config: TrainConfig, ways: Sequence[str], num_rounds: int) -> dict[str, list[Timed]]:
    """Train `num_rounds` times each way, with a seed for each round, showing the results of each."""
    results: dict[str, list[Timed]] = {way: [] for way in ways}
    for number in range(num_rounds):
        seeded = config.model_copy(update={"seed": config.seed + number})
        for way, timed in _one_round(seeded, ways).items():
            results[way].append(timed)
            rate = timed.num_examples / timed.train_s
            print(f"round {number + 1}: {_WAYS[way]:<18} {timed.train_s:6.1f} s  {rate:5.1f} examples/s", flush=True)
    return results


def compared(results: Mapping[str, Sequence[Timed]]) -> dict[str, Any]:
    """What one way is to another in the same round: the medians of times, the mean and standard error of losses."""

    def pairs(of: str, to: str) -> list[tuple[Timed, Timed]]:
        return list(zip(results[of], results[to], strict=True))

    figures: dict[str, Any] = {}
    if {"trl", "loop"} <= results.keys():
        figures["speedup_vs_trl"] = statistics.median(a.train_s / b.train_s for a, b in pairs("trl", "loop"))
        losses = [b.eval_loss - a.eval_loss for a, b in pairs("trl", "loop")]
        figures["eval_loss_vs_trl"] = statistics.mean(losses)
        if len(losses) > 1:  # order and first weights differ: one round tells little
            figures["eval_loss_vs_trl_stderr"] = statistics.stdev(losses) / math.sqrt(len(losses))
    if {"loop", "ray"} <= results.keys():
        figures["ray_overhead"] = statistics.median(b.train_s / a.train_s - 1 for a, b in pairs("loop", "ray"))
    rounded = {name: round(figure, 4) for name, figure in figures.items()}
    first = next(iter(results.values()))
    return {**rounded, "num_examples": first[0].num_examples, "num_rounds": len(first)}


def print_table(results: Mapping[str, Sequence[Timed]]) -> None:
    """Medians of every way."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "steps, s", "examples/s", "tokens/s", "held-out loss", "whole, s", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for way, timed in results.items():
        train_s = statistics.median(t.train_s for t in timed)
        table.add_row(
            _WAYS[way],
            f"{train_s:.1f}",
            f"{timed[0].num_examples / train_s:.1f}",
            f"{timed[0].num_tokens / train_s:.0f}",
            f"{statistics.median(t.eval_loss for t in timed):.3f}",
            f"{statistics.median(t.whole_s for t in timed):.0f}",
        )
    Console(width=100, highlight=False).print(table)


def _one_round(config: TrainConfig, ways: Sequence[str]) -> dict[str, Timed]:
    with tempfile.TemporaryDirectory() as scratch:

        def phases(way: str) -> dict[str, float]:
            begun = RunDir(scratch, way).read_json(PhaseLog.FILE) or []
            return {one["phase"]: one["time"] for one in begun}

        def is_training(way: str) -> bool:
            return "training" in phases(way)

        command = [sys.executable, "-m", "training.bench", "--scratch", scratch]
        told = {way: config.model_copy(update={"storage_path": scratch, "run_name": way}) for way in ways}
        commands = {way: [*command, "--way", way, "--json-config", told[way].model_dump_json()] for way in ways}
        try:
            done = run_interleaved(commands, is_training)
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from error
        timed = {}
        for way, (taker, printed) in done.items():
            figures = json.loads(printed.splitlines()[-1])
            begun = phases(way)
            ended = min(at for at in begun.values() if at > begun["training"])
            figures["train_s"] = taker.active_s(ended - figures["train_s"], ended)  # the others' turns are in it
            timed[way] = Timed(**figures, whole_s=taker.active_s(0, math.inf))
        return timed


def _train(config: TrainConfig, way: str, scratch: Path) -> dict[str, float]:
    """What the process of one way does; returns the fields of `Timed` but the last, with `train_s` by the clock."""
    if way == "ray":
        metrics = _by_ray(config)
    else:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        metrics = (_by_trl if way == "trl" else _by_loop)(config, _Phases(RunDir(scratch, way)), scratch / way)
    from training.data.run_inputs import read_inputs

    num_rows = len(read_inputs(config).train_rows)
    num_steps, size = int(metrics["num_steps"]), config.step_size
    epoch_steps = -(-num_rows // size)
    whole, rest = divmod(num_steps, epoch_steps)
    return {
        "train_s": metrics["train_s"],
        "num_examples": whole * num_rows + min(rest * size, num_rows),
        "num_tokens": metrics["num_train_tokens"],
        "eval_loss": metrics["eval_loss"],
    }


def _by_ray(config: TrainConfig) -> dict[str, float]:
    from training.ray_train.fit import fit

    return fit(config).metrics


class _Phases:
    """A `training.trainer.callback.RunReporter` of which nothing is kept but when its phases began."""

    rank = 0

    def __init__(self, run_dir: RunDir) -> None:
        self._log = PhaseLog(run_dir)

    def on_phase(self, phase: str) -> None:
        self._log.add(phase)

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None: ...

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None: ...


def _by_loop(config: TrainConfig, phases: _Phases, scratch: Path) -> dict[str, float]:
    import torch

    from training.trainer.train import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train(
        config, phases, adapter_dir=scratch / "adapter", scratch_dir=scratch / "checkpoints", device=device
    ).metrics


def _by_trl(config: TrainConfig, phases: _Phases, scratch: Path) -> dict[str, float]:
    """SFTTrainer as its documentation has it, over rows that are tokenized and masked already."""
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
    forbid_packed_cpu_kernel(base)  # else the gradient through the base is lost after an evaluation
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
    phases.on_phase("training")
    started = time.monotonic()
    trainer.train()
    train_s = time.monotonic() - started
    phases.on_phase("held-out loss")
    trainer.model.eval()
    loss, _ = held_out_loss(trainer.model, inputs.held_out_rows)
    counted = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    return {
        "train_s": train_s,
        "num_steps": trainer.state.global_step,
        "num_train_tokens": float(counted[-1]),
        "eval_loss": loss,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.bench", description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", default="configs/train/quickstart.yaml", help="a training YAML")
    parser.add_argument("--rounds", type=int, default=3, help="how often each trains")
    parser.add_argument("--ways", default=",".join(_WAYS), help="which of them, such as loop,ray")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_steps=46; default: one epoch")
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json-config", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.way:
        print(json.dumps(_train(TrainConfig.model_validate_json(args.json_config), args.way, args.scratch)))
        return 0
    fixed = ["num_train_epochs=1", "sample_prompts=0", "report_to=[]", "save_steps=1000000", *args.overrides]
    ways = [way for way in _WAYS if way in args.ways.split(",")]
    results = run_bench(load_config(args.config, fixed), ways, args.rounds)
    print_table(results)
    print(json.dumps(compared(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
