"""Processes that are interleaved in one-second slices, so that all are timed under the same conditions.

For comparisons of a few percent on machines whose speed varies by more from one minute to the next. Outside its slices
a process is stopped, together with all its descendants.
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

_SLICE_S = 1.0
_POLL_INTERVAL_S = 0.1
_SHUTDOWN_TIMEOUT_S = 30.0


@dataclass(slots=True)
class SlicedProcess:
    """A started process, and the slices of time in which it ran.

    Attributes:
        slices: [(begin, end), ...] in unix seconds.
    """

    process: subprocess.Popen[str]
    stdout: IO[str]
    stderr: IO[str]
    slices: list[tuple[float, float]] = field(default_factory=list)

    def active_s(self, begin: float, end: float) -> float:
        """How long the process ran between two points in time."""
        return sum(max(0.0, min(end, slice_end) - max(begin, slice_begin)) for slice_begin, slice_end in self.slices)

    def run(self, until: Callable[[], bool], timeout_s: float) -> bool:
        """Let it run until it ends, `until` returns True, or `timeout_s` has passed; returns whether it has ended."""
        _signal(self.process, signal.SIGCONT)
        begin = time.time()
        while self.process.poll() is None and not until() and time.time() < begin + timeout_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(min(_POLL_INTERVAL_S, timeout_s))
        has_ended = self.process.returncode is not None
        if not has_ended:
            _signal(self.process, signal.SIGSTOP)
        self.slices.append((begin, time.time()))
        return has_ended


def run_interleaved(
    commands: Mapping[str, Sequence[str]], is_ready: Callable[[str], bool]
) -> dict[str, tuple[SlicedProcess, str]]:
    """Run all commands until they end; returns each process and its stdout.

    Args:
        is_ready: whether the command of this name may be interleaved. Until then it runs alone, one command after
            another, as programs have timeouts while they start.

    Raises:
        RuntimeError: one of them failed, with its name and the end of its stderr; the others are stopped.
    """
    processes: dict[str, SlicedProcess] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            sliced = processes[name] = stack.enter_context(_started(command))
            sliced.run(partial(is_ready, name), math.inf)
        running = dict(processes)
        while running:
            for name, sliced in [*running.items()]:
                if not sliced.run(lambda: False, _SLICE_S):
                    continue
                del running[name]
                if sliced.process.returncode != 0:
                    raise RuntimeError(f"{name} failed:\n{_content(sliced.stderr)[-3000:]}")
        return {name: (sliced, _content(sliced.stdout)) for name, sliced in processes.items()}


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[SlicedProcess]:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True)
        try:
            yield SlicedProcess(process, stdout, stderr)
        finally:
            if process.poll() is None:
                tree = _process_tree(process)
                process.send_signal(signal.SIGINT)  # as Ctrl-C does: Ray shuts down in order
                _signal(process, signal.SIGCONT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SHUTDOWN_TIMEOUT_S)
                for member in tree:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                process.wait()


def _content(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a process and its descendants; twice, for those that were being started."""
    for _ in range(2):
        for member in _process_tree(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)


def _process_tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []
