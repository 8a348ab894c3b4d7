"""Processes that run by turns of a second, so that all of them are timed on the same machine at the same moments.

`training.bench` compares by it what differs by a few percent, on machines whose speed changes by more from one minute
to the next. A process whose turn it is not is stopped with all that it started.
"""

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

import psutil

_TURN_S = 1.0
_LOOKS_EVERY_S = 0.1
_ENDS_WITHIN_S = 30.0


@dataclass(slots=True)
class TurnTaker:
    """A process that has been started, and when it ran.

    Attributes:
        turns: [(begin, end), ...] in unix seconds.
    """

    process: subprocess.Popen[str]
    stdout: IO[str]
    stderr: IO[str]
    turns: list[tuple[float, float]] = field(default_factory=list)

    def active_s(self, begin: float, end: float) -> float:
        """How long the process ran between two moments."""
        return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in self.turns)

    def run(self, until: Callable[[], bool], at_most_s: float) -> bool:
        """Let it run until it ends or `until` says so; returns whether it has ended."""
        _signal(self.process, signal.SIGCONT)
        began = time.time()
        while (ended := self.process.poll() is not None) is False and not until():
            left_s = began + at_most_s - time.time()
            if left_s <= 0:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(min(left_s, _LOOKS_EVERY_S))
        if not ended:
            _signal(self.process, signal.SIGSTOP)
        self.turns.append((began, time.time()))
        return ended


def run_by_turns(
    commands: Mapping[str, Sequence[str]], is_ready: Callable[[str], bool]
) -> dict[str, tuple[TurnTaker, str]]:
    """Run all commands to their end; returns each with what it printed.

    Args:
        is_ready: of a name in `commands`: whether its turns may begin. Before that each runs alone, one after another,
            as what starts has timeouts.

    Raises:
        RuntimeError: one of them failed, with its name and the end of its stderr; the others are stopped.
    """
    takers: dict[str, TurnTaker] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            taker = takers[name] = stack.enter_context(_started(command))
            taker.run(lambda name=name: is_ready(name), float("inf"))  # type: ignore[misc]
        running = dict(takers)
        while running:
            for name, taker in [*running.items()]:
                if not taker.run(lambda: False, _TURN_S):
                    continue
                del running[name]
                if taker.process.returncode != 0:
                    taker.stderr.seek(0)
                    raise RuntimeError(f"{name} failed:\n{taker.stderr.read()[-3000:]}")
        printed = {}
        for name, taker in takers.items():
            taker.stdout.seek(0)
            printed[name] = taker.stdout.read()
    return {name: (taker, printed[name]) for name, taker in takers.items()}


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[TurnTaker]:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True)
        try:
            yield TurnTaker(process, stdout, stderr)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # as Ctrl-C does: Ray goes down in order
                _signal(process, signal.SIGCONT)
                try:
                    process.wait(_ENDS_WITHIN_S)
                except subprocess.TimeoutExpired:
                    _signal(process, signal.SIGKILL)
                    process.wait()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a process and all that came from it; twice, for those that were being started."""
    for _ in range(2):
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            for one in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
