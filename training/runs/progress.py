"""A run's progress: written to `progress.json` by a worker, read back and shown on stderr by the waiting process.

A terminal shows a progress bar; a log gets a line per phase and one every 15 to 60 seconds.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from training.errors import CorralError
from training.runs.run_dir import RunDir

if TYPE_CHECKING:
    from rich.console import Console

PROGRESS_FILE = "progress.json"
_LOG_EVERY_S = 15.0
_LOG_MAX_EVERY_S = 60.0  # in a run that takes hours


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run at one moment; fields that are known only during training may be None."""

    phase: str
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    time: float = field(default_factory=time.time)  # Unix seconds; serves as a heartbeat

    def __str__(self) -> str:
        text = self.phase
        if self.step is not None:
            text += f"  step {self.step}/{self.num_steps}  {self.figures}"
        if self.eta_s is not None:
            text += f"  {_clock(self.eta_s)} left"
        return text

    @property
    def figures(self) -> str:
        """Loss and speed, if known."""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}"
        speed = "" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s"
        return "  ".join(part for part in (loss, speed) if part)

    def to_json(self) -> str:
        """The content of `progress.json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Progress | None":
        """The reverse of `to_json`; None for anything that it did not write."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


ProgressReader = Callable[[], Progress | None]


def write_progress(run_dir: RunDir, progress: Progress) -> None:
    """Write `progress` as the run's current state."""
    run_dir.write_text(PROGRESS_FILE, progress.to_json())


def read_progress(run_dir: RunDir) -> Progress | None:
    """The last state that `write_progress` wrote; None if there is none or it cannot be read now."""
    with contextlib.suppress(CorralError):
        return Progress.from_json(run_dir.read_text(PROGRESS_FILE) or "")
    return None


@contextlib.contextmanager
def show_progress(read: ProgressReader, title: str, poll_s: float = 0.3) -> Iterator[None]:
    """Show what `read` returns on stderr while the block runs.

    Args:
        poll_s: seconds between two calls of `read`; choose more for an object store.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    finished = threading.Event()
    show = _show_bar if console.is_terminal else _show_lines
    thread = threading.Thread(target=show, args=(console, read, title, poll_s, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def show_progress_of(run_dir: RunDir, title: str) -> contextlib.AbstractContextManager[None]:
    """`show_progress` for the run in `run_dir`; an object store is polled less often."""
    return show_progress(lambda: read_progress(run_dir), title, poll_s=0.3 if run_dir.is_local else 5.0)


def _show_bar(console: "Console", read: ProgressReader, title: str, poll_s: float, finished: threading.Event) -> None:
    from rich import progress as bars

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.TextColumn("{task.fields[state]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{title}: starting", total=None, state="")
        while not finished.wait(poll_s):
            if (progress := read()) is None:
                continue
            if progress.step is None:
                bar.update(task, description=f"{title}: {progress.phase}", total=None, state="")
            else:
                remaining = "" if progress.eta_s is None else f"  {_clock(progress.eta_s)} left"
                state = f"{progress.step}/{progress.num_steps}  {progress.figures}{remaining}"
                bar.update(task, description=title, total=progress.num_steps, completed=progress.step, state=state)


def _show_lines(console: "Console", read: ProgressReader, title: str, poll_s: float, finished: threading.Event) -> None:
    started = time.monotonic()
    last: Progress | None = None
    last_at = 0.0
    while not finished.wait(poll_s):
        progress, now = read(), time.monotonic()
        every_s = min(_LOG_MAX_EVERY_S, _LOG_EVERY_S + (now - started) / 20)
        if progress is None or (last and str(progress) == str(last)):
            continue
        if last is None or progress.phase != last.phase or now - last_at > every_s:
            console.print(f"{title}: {progress}", soft_wrap=True, markup=False)
            last, last_at = progress, now


def _clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from one hour."""
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
