"""`python -m training --config X.yaml key=value ...`: train an adapter and register it, or the best one of a sweep.

Runs here, or on a Ray cluster: `ray job submit --working-dir . -- python -m training --config X.yaml`. A YAML that has
`search` is a sweep's. `corral train` and `corral sweep` call `run_training` and `run_search` too.
"""

import argparse
import contextlib
import sys
from typing import Any

from training.config.train_config import TrainConfig
from training.errors import ConfigError, CorralError, RunStopped
from training.local_ray.signals import sigterm_interrupts
from training.planning.plan import dry_run
from training.ray_train.fit import fit
from training.registry.manifest import AdapterManifest
from training.runs.register import register
from training.runs.report import REPORT_FILE, write_report
from training.runs.result import RunResult
from training.runs.run_dir import RunDir
from training.sweep.config import SweepConfig, load_run_config, plan
from training.sweep.report import print_plan, print_result
from training.sweep.run import run_sweep


def run_training(config: TrainConfig, *, force: bool = False, debug: bool = False) -> AdapterManifest:
    """Train, evaluate on the held-out rows, register, and print what came of it.

    Args:
        force: register an adapter that does not pass `gate` all the same; its manifest says so.

    Raises:
        CorralError: the run failed or was stopped, or its adapter is refused.
    """
    with sigterm_interrupts():
        result = fit(config, debug=debug)
        try:
            manifest = register(config, result, force=force)
        except KeyboardInterrupt:  # the registry has a whole version or none
            raise RunStopped(result.run_name) from None
        except CorralError as error:
            _leave_report(result.run_dir, {"refused": str(error)})
            raise
        _leave_report(result.run_dir, {"model_id": manifest.model_id, "forced": manifest.forced})
    print(summary(manifest, result))
    return manifest


def run_search(config: SweepConfig, *, force: bool = False, as_json: bool = False, debug: bool = False) -> int:
    """Run the trials of a sweep, register the best, and print what came of them.

    Returns the exit code: 1 if nothing was registered.

    Raises:
        CorralError: config, data or machine do not fit, or the sweep was stopped.
    """
    with sigterm_interrupts():
        result = run_sweep(config, force=force, debug=debug)
    print_result(result, json_=as_json)
    return 0 if result.manifest else 1


def summary(manifest: AdapterManifest, result: RunResult) -> str:
    """A few lines for the person who waited: what was learned, and which model id to ask."""
    metrics = result.metrics
    lines = [f"\n{manifest.model_id} is registered" + (" (forced)" if manifest.forced else "")]
    minutes, seconds = divmod(round(metrics["train_s"]), 60)
    lines.append(f"  trained        {metrics['num_steps']:.0f} steps in {minutes}:{seconds:02d}")
    if "eval_reward_margin" in metrics:
        lines.append(
            f"  held-out loss  reference {metrics['base_eval_loss']:.3f}, adapter {metrics['eval_loss']:.3f}; "
            f"{metrics['eval_preference_accuracy']:.0%} preferred rightly, reward margin "
            f"{metrics['eval_reward_margin']:.2f}"
        )
    elif "eval_loss" in metrics:
        share = metrics["eval_loss"] / metrics["base_eval_loss"]
        lines.append(
            f"  held-out loss  base {metrics['base_eval_loss']:.3f}, adapter {metrics['eval_loss']:.3f} ({share:.0%})"
        )
    report = result.inputs.report
    if skipped := [*report.skipped, *report.too_long]:
        count = report.num_skipped + report.num_too_long
        lines.append(f"  rows skipped   {count}, the first {skipped[0].source}: {skipped[0].reason}")
    for sample in result.samples:
        lines += [f"  > {_one_line(sample['prompt'])}"]
        lines += [f"    base     {_one_line(sample['base'])}", f"    adapter  {_one_line(sample['adapter'])}"]
    lines.append(f"  report         {result.run_dir}/{REPORT_FILE}")
    lines.append(f"  ask it with    corral chat --model {manifest.base.name}:{manifest.name}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m training", description="Train an adapter and register it.")
    parser.add_argument("--config", required=True, help="YAML file, such as configs/train/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=8 learning_rate=1e-4")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--json", action="store_true", help="print --dry-run, or a sweep's trials, as JSON")
    parser.add_argument("--force", action="store_true", help="register even if the held-out loss is no better")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and Ray's own log")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_run_config(args.config, args.overrides)
        if isinstance(config, SweepConfig):
            if not args.dry_run:
                return run_search(config, force=args.force, as_json=args.json, debug=args.debug)
            print_plan(plan(config), json_=args.json)
        elif args.dry_run:
            print(dry_run(config, as_json=args.json))
        else:
            run_training(config, force=args.force, debug=args.debug)
    except CorralError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    return 0


def _leave_report(run_dir: RunDir, outcome: dict[str, Any]) -> None:
    """What became of the adapter, and the report, in the run's directory; no full disk undoes it."""
    with contextlib.suppress(CorralError):
        run_dir.write_json("registered.json", outcome)
        write_report(run_dir)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


if __name__ == "__main__":
    sys.exit(main())
