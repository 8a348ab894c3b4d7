"""The report of a run, for people: `report.md`, `report.png`, `loss.png`, made of the run directory's files alone.

The driver writes it when a run ends, well or not; `build_report` can be asked at any time. Files that are missing leave
their section out, so a run that failed early still says how far it came.
"""

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.planning.plan import memory_lines
from training.runs.metrics_log import Metrics, read_metrics
from training.runs.run_dir import RunDir
from training.runs.run_lock import LockHolder, read_lock_holder

REPORT_FILE, REPORT_PLOT, LOSS_PLOT = "report.md", "report.png", "loss.png"
_CELL_CHARS = 400


def write_report(run_dir: RunDir) -> None:
    """Write the report and its pictures into the run's directory.

    Raises:
        TrainingError: the directory cannot be read or written.
    """
    metrics = read_metrics(run_dir)
    if metrics.steps:
        from training.runs.report_plots import plot_loss, plot_run

        base_loss = (run_dir.read_json("result.json") or {}).get("metrics", {}).get("base_eval_loss")
        with tempfile.TemporaryDirectory(prefix="corral-") as folder:
            for plot, name in ((plot_loss, LOSS_PLOT), (plot_run, REPORT_PLOT)):
                plot(metrics, base_loss, Path(folder) / name)
                run_dir.upload(Path(folder) / name, name)
    run_dir.write_text(REPORT_FILE, build_report(run_dir))


def build_report(run_dir: RunDir) -> str:
    """The report as Markdown."""
    files = {name: run_dir.read_json(f"{name}.json") or {} for name in _FILES}
    metrics = read_metrics(run_dir)
    result: dict[str, float] = files["result"].get("metrics", {})
    sections = [
        ("", _headline(run_dir.name, files, metrics, result)),
        ("Curve", _curve(metrics)),
        ("Answers to held-out prompts", _samples(files["result"].get("samples", []))),
        ("Memory", _memory(files, metrics)),
        ("Speed and cost", _speed(files, metrics, result, read_lock_holder(run_dir))),
        ("Data", _data(files["data"])),
        ("Configuration that is not default", _changed(files["config"])),
        ("Environment", _environment(files["environment"], files["trackers"])),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text) + "\n"


_FILES = ("config", "plan", "data", "result", "failure", "registered", "phases", "environment", "trackers")


def _headline(name: str, files: Mapping[str, Any], metrics: Metrics, result: Mapping[str, float]) -> str:
    config, registered = files["config"], files["registered"]
    lines = [f"# {config.get('adapter', name)} on {config.get('base_model', 'its base')}", f"Run `{name}`."]
    if "eval_loss" in result:
        base, adapter = result["base_eval_loss"], result["eval_loss"]
        lines.append(f"**Held-out loss: base {base:.3f}, adapter {adapter:.3f}** ({adapter / base:.0%} of the base's).")
    if model_id := registered.get("model_id"):
        forced = ", forced past the gate" if registered.get("forced") else ""
        asked = model_id.partition("@")[0]
        lines.append(f"Registered as `{model_id}`{forced}. Ask it: `corral chat --model {asked}`")
    elif reason := registered.get("refused"):
        lines.append(f"**Not registered**: {_cell(reason)}")
    if reason := files["failure"].get("message"):
        reached = f" after step {metrics.steps[-1]} of {metrics.num_steps}" if metrics.steps else ""
        lines.append(f"**Failed**{reached}: {_cell(reason)}")
    elif not result:
        reached = f"at step {metrics.steps[-1]} of {metrics.num_steps}" if metrics.steps else "before its first step"
        lines.append(f"Not finished: {reached}.")
    return "\n\n".join(lines)


def _curve(metrics: Metrics) -> str:
    if not metrics.steps:
        return ""
    loss = metrics.column("loss")
    rows = [("first step", metrics.steps[0], loss[0]), ("lowest", metrics.steps[loss.index(min(loss))], min(loss))]
    rows.append(("last step", metrics.steps[-1], loss[-1]))
    rows += [("held out", step, value) for step, value in metrics.points("eval_loss")]
    return f"![loss, learning rate, tokens per second]({REPORT_PLOT})\n\n" + _table(
        ("loss", "step", "nats per token"), ((what, str(step), f"{value:.4f}") for what, step, value in rows)
    )


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    keys = ("prompt", "reference", "base", "adapter")
    return _table(keys, ([sample.get(key, "") for key in keys] for sample in samples)) if samples else ""


def _memory(files: Mapping[str, Any], metrics: Metrics) -> str:
    estimated = files["plan"].get("memory")
    measured = max(metrics.column("peak_memory_bytes"), default=0.0)
    rows = []
    if measured:
        rows.append(("measured on worker 0", _gib(measured)))
    if estimated:
        comparable = estimated["allocated"] if estimated["on_gpu"] else estimated["total"]
        rows.append(("estimated", _gib(comparable)))
    if not rows:
        return ""
    on_gpu = bool(estimated and estimated["on_gpu"])
    of = "`torch.cuda.max_memory_allocated`" if on_gpu else "the whole process, Python and libraries included"
    parts = "\n\n```\n" + "\n".join(memory_lines(estimated)) + "\n```" if estimated else ""
    return _table(("peak of a worker", ""), rows) + f"\n\nMeasured is {of}. The estimate in parts:{parts}"


def _speed(files: Mapping[str, Any], metrics: Metrics, result: Mapping[str, float], driver: LockHolder | None) -> str:
    if not metrics.steps:
        return ""
    rows = [
        (title, f"{statistics.median(values):,.1f}")
        for title, key in (("tokens per second, median step", "tokens_per_s"), ("samples per second", "samples_per_s"))
        if (values := metrics.column(key))
    ]
    tokens = max(metrics.column("num_tokens"), default=0.0)
    rows.append(("tokens trained", f"{tokens:,.0f}"))
    if train_s := result.get("train_s"):
        rows.append(("time in training", _clock(train_s)))
    ended = (driver.ended if driver else None) or metrics.times[-1]
    phases = files["phases"] or []
    begins = [*(phase["time"] for phase in phases), ended]
    for phase, begin, end in zip(phases, begins, begins[1:], strict=False):
        rows.append((f"time of: {phase['phase']}", _clock(end - begin)))
    price = files["config"].get("price_per_hour")
    if driver:
        rows.append(("time of the whole run", _clock(ended - driver.started)))
        if price is not None:
            cost = price * (ended - driver.started) / 3600
            rows.append((f"cost at {price:g} an hour", f"{cost:.4g}"))
            rows.append(("cost of a million tokens", f"{cost / (tokens / 1e6):.4g}" if tokens else ""))
    return _table(("", ""), rows)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    rows = [
        ("training rows", f"{data['num_train_rows']:,} ({data['num_train_tokens']:,} tokens an epoch)"),
        ("tokens with loss", f"{data['num_trained_tokens']:,}"),
        ("held-out rows", f"{data['num_held_out']:,}"),
        ("left out", f"{data['num_skipped']:,} bad, {data['num_too_long']:,} too long"),
        ("said twice", f"{data['num_duplicates']:,}" + (", left out" if data["deduplicated"] else ", kept")),
        ("formats", ", ".join(data["formats"])),
        ("tokens a row", "median {p50:,}, 95 % up to {p95:,}, longest {max:,}".format(**data["lengths"])),
        ("sources", ", ".join(source["path"] for source in data["sources"])),
    ]
    notes = "".join(f"\n- {_cell(warning)}" for warning in data["warnings"])
    return _table(("", ""), rows) + (f"\n{notes}" if notes else "")


def _changed(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    smallest = {"adapter": "a", "data": {"path": "a.jsonl"}}
    default = _flat(resolved(TrainConfig.model_validate(smallest)))
    rows = [(f"`{key}`", str(value)) for key, value in _flat(config).items() if value != default.get(key)]
    return _table(("key", "value"), rows)


def _environment(environment: Mapping[str, Any], trackers: Mapping[str, Any]) -> str:
    rows = []
    if environment:
        devices: list[str] = environment["devices"]
        rows += [(name, f"{devices.count(name)} x") for name in dict.fromkeys(devices)]
        rows += [("corral", str(environment["code_version"])), ("commit", str(environment["git_commit"]))]
        rows += [*environment["libraries"].items()]
    rows += [(f"{name} failed", reason) for name, reason in trackers.get("failed", {}).items()]
    return _table(("", ""), rows) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text that cannot break out of its cell, nor be taken for HTML."""
    text = " ".join(text.split())
    text = text if len(text) <= _CELL_CHARS else text[: _CELL_CHARS - 3] + "..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
