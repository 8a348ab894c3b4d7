"""What a run is doing, from the worker that does it to the terminal of the person who waits.

The worker writes `progress.json` into the run's directory with `write_progress`; the driver shows it with
`show_progress_of`. A terminal gets a bar, a log a line now and then.
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
_LOG_AT_MOST_EVERY_S = 60.0  # of a run that takes hours


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; what is None is known during training only."""

    phase: str
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    time: float = field(default_factory=time.time)  # unix seconds; of a run that lives it is not long ago

    def __str__(self) -> str:
        text = self.phase
        if self.step is not None:
            text += f"  step {self.step}/{self.num_steps}  {self.figures}"
        if self.eta_s is not None:
            text += f"  {_clock(self.eta_s)} left"
        return text

    @property
    def figures(self) -> str:
        """Loss and speed, as far as they are known."""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}"
        speed = "" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s"
        return "  ".join(part for part in (loss, speed) if part)

    def to_json(self) -> str:
        """The content of `progress.json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Progress | None":
        """The reverse of `to_json`; None for what it did not write."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


ProgressReader = Callable[[], Progress | None]


def write_progress(run_dir: RunDir, progress: Progress) -> None:
    """Make `progress` the present state of the run."""
    run_dir.write_text(PROGRESS_FILE, progress.to_json())


def read_progress(run_dir: RunDir) -> Progress | None:
    """What `write_progress` wrote; None where nothing is there, or nothing can be read at the moment."""
    with contextlib.suppress(CorralError):
        return Progress.from_json(run_dir.read_text(PROGRESS_FILE) or "")
    return None


@contextlib.contextmanager
def show_progress(read: ProgressReader, title: str, poll_s: float = 0.3) -> Iterator[None]:
    """Show on stderr what `read` returns while the block runs.

    Args:
        poll_s: seconds between two calls of `read`; give an object store more.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    done = threading.Event()
    show = _show_bar if console.is_terminal else _show_lines
    thread = threading.Thread(target=show, args=(console, read, title, poll_s, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def show_progress_of(run_dir: RunDir, title: str) -> contextlib.AbstractContextManager[None]:
    """As `show_progress`, of the run in `run_dir`; an object store is asked less often."""
    return show_progress(lambda: read_progress(run_dir), title, poll_s=0.3 if run_dir.is_local else 5.0)


def _show_bar(console: "Console", read: ProgressReader, title: str, poll_s: float, done: threading.Event) -> None:
    from rich import progress as bars

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.TextColumn("{task.fields[state]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{title}: starting", total=None, state="")
        while not done.wait(poll_s):
            if (now := read()) is None:
                continue
            if now.step is None:
                bar.update(task, description=f"{title}: {now.phase}", total=None, state="")
            else:
                left = "" if now.eta_s is None else f"  {_clock(now.eta_s)} left"
                state = f"{now.step}/{now.num_steps}  {now.figures}{left}"
                bar.update(task, description=title, total=now.num_steps, completed=now.step, state=state)


def _show_lines(console: "Console", read: ProgressReader, title: str, poll_s: float, done: threading.Event) -> None:
    started = time.monotonic()
    last: Progress | None = None
    last_at = 0.0
    while not done.wait(poll_s):
        now, at = read(), time.monotonic()
        every_s = min(_LOG_AT_MOST_EVERY_S, _LOG_EVERY_S + (at - started) / 20)
        if now is None or (last and str(now) == str(last)):
            continue
        if last is None or now.phase != last.phase or at - last_at > every_s:
            console.print(f"{title}: {now}", soft_wrap=True, markup=False)
            last, last_at = now, at


def _clock(seconds: float) -> str:
    """m:ss, and h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
