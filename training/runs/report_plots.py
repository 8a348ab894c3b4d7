"""The plots of a run's report, drawn without a display from the logged metrics alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.runs.metrics_log import Metrics

_DARK, _PALE, _HELD_OUT, _BASE = "#1f4e79", "#a9c4de", "#c8511b", "#7a7a7a"


def plot_loss(metrics: Metrics, base_loss: float | None, file: Path) -> None:
    """Plot the loss alone: raw and smoothed, the held-out losses, and the base's held-out loss as a line."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _draw_loss(figure.subplots(), metrics, base_loss)
    _save(figure, file)


def plot_run(metrics: Metrics, base_loss: float | None, file: Path) -> None:
    """Plot loss, learning rate and tokens per second over the steps."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, rate, speed = figure.subplots(3, sharex=True, height_ratios=[3, 1, 1])
    _draw_loss(loss, metrics, base_loss)
    for axes, key, label in ((rate, "learning_rate", "learning rate"), (speed, "tokens_per_s", "tokens/s")):
        if points := metrics.points(key):
            axes.plot(*zip(*points, strict=True), color=_DARK, linewidth=1.2)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    loss.set_xlabel("")
    speed.set_xlabel("step")
    _save(figure, file)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with Adam's bias correction (arXiv:1412.6980), so the start is not pulled to zero."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means


def _draw_loss(axes: Any, metrics: Metrics, base_loss: float | None) -> None:
    steps, loss = zip(*metrics.points("loss"), strict=True)
    axes.plot(steps, loss, color=_PALE, linewidth=1, label="training, each step")
    weight = min(0.9, max(0.0, 1 - 10 / len(loss)))  # averages over a tenth of a short run, ten steps of a longer one
    axes.plot(steps, smoothed(loss, weight), color=_DARK, linewidth=1.8, label="training, smoothed")
    if held_out := metrics.points("eval_loss"):
        axes.plot(*zip(*held_out, strict=True), "o-", color=_HELD_OUT, linewidth=1, markersize=4, label="held out")
    if base_loss is not None:
        axes.axhline(base_loss, color=_BASE, linewidth=1, linestyle="--", label="base, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)  # needs no display; the figure keeps a reference to it
    figure.savefig(file, format="png")
