"""Processes that run by turns of a second, so that all of them are timed on the same machine at the same moments.

`training.bench` compares by it what differs by a few percent, on machines whose speed changes by more from one minute
to the next. A process whose turn it is not is stopped with all that it started.
"""

import contextlib
import math
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO

import psutil

_TURN_S = 1.0
_LOOKS_EVERY_S = 0.1
_ENDS_WITHIN_S = 30.0


@dataclass(slots=True)
class SlicedProcess:
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
        """Let it run until it ends, `until` says so, or its time is over; returns whether it has ended."""
        _signal(self.process, signal.SIGCONT)
        began = time.time()
        while self.process.poll() is None and not until() and time.time() < began + at_most_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(min(_LOOKS_EVERY_S, at_most_s))
        has_ended = self.process.returncode is not None
        if not has_ended:
            _signal(self.process, signal.SIGSTOP)
        self.turns.append((began, time.time()))
        return has_ended


def run_interleaved(
    commands: Mapping[str, Sequence[str]], is_ready: Callable[[str], bool]
) -> dict[str, tuple[SlicedProcess, str]]:
    """Run all commands to their end; returns each with what it printed.

    Args:
        is_ready: of a name in `commands`: whether its turns may begin. Before that each runs alone, one after another,
            as what starts has timeouts.

    Raises:
        RuntimeError: one of them failed, with its name and the end of its stderr; the others are stopped.
    """
    takers: dict[str, SlicedProcess] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            taker = takers[name] = stack.enter_context(_started(command))
            taker.run(partial(is_ready, name), math.inf)
        running = dict(takers)
        while running:
            for name, taker in [*running.items()]:
                if not taker.run(lambda: False, _TURN_S):
                    continue
                del running[name]
                if taker.process.returncode != 0:
                    raise RuntimeError(f"{name} failed:\n{_content(taker.stderr)[-3000:]}")
        return {name: (taker, _content(taker.stdout)) for name, taker in takers.items()}


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[SlicedProcess]:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True)
        try:
            yield SlicedProcess(process, stdout, stderr)
        finally:
            if process.poll() is None:
                all_of_it = _tree(process)
                process.send_signal(signal.SIGINT)  # as Ctrl-C does: Ray goes down in order
                _signal(process, signal.SIGCONT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_ENDS_WITHIN_S)
                for one in all_of_it:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                process.wait()


def _content(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a process and all that came from it; twice, for those that were being started."""
    for _ in range(2):
        for one in _tree(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


def _tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []
