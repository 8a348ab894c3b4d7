"""What a run is doing, from the worker that does it to the terminal of the person who waits.

The worker writes `progress.json` into the run's directory, the driver reads it: both see that directory anyway, on
one machine and on a cluster. A terminal gets one line that changes, a log a line now and then.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.errors import CorralError
from training.run_dir import RunDir

if TYPE_CHECKING:
    from rich.console import Console

_POLL_S = 0.3
_LOG_EVERY_S = 15.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; everything but `phase` is known during training only."""

    phase: str
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None

    def __str__(self) -> str:
        text = self.phase
        if self.step is not None:
            text += f"  step {self.step}/{self.num_steps}  loss {self.loss:.3f}  {self.tokens_per_s:.0f} tokens/s"
        if self.eta_s is not None:
            text += f"  {int(self.eta_s) // 60}:{int(self.eta_s) % 60:02d} left"
        return text


@contextlib.contextmanager
def show_progress(run_dir: RunDir, title: str) -> Iterator[None]:
    """Show the run's state on stderr while the block runs."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    done = threading.Event()
    show = _show_live if console.is_terminal else _show_lines
    thread = threading.Thread(target=show, args=(console, run_dir, title, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_live(console: "Console", run_dir: RunDir, title: str, done: threading.Event) -> None:
    with console.status(f"{title}: starting Ray") as status:
        while not done.wait(_POLL_S):
            if progress := _read(run_dir):
                status.update(f"{title}: {progress}")


def _show_lines(console: "Console", run_dir: RunDir, title: str, done: threading.Event) -> None:
    last_phase, last_at = None, 0.0
    while not done.wait(_POLL_S):
        progress = _read(run_dir)
        if progress and (progress.phase != last_phase or time.monotonic() - last_at > _LOG_EVERY_S):
            console.print(f"{title}: {progress}", soft_wrap=True)
            last_phase, last_at = progress.phase, time.monotonic()


def _read(run_dir: RunDir) -> Progress | None:
    with contextlib.suppress(CorralError, TypeError):  # the worker's next try may succeed
        return Progress(**(run_dir.read_json("progress.json") or {}))
    return None
