"""How SIGTERM and Ctrl-C end a run: both raise KeyboardInterrupt in the driver, and Ray goes down in order.

`training.ray_train.fit` and `python -m training` use it. Ray replaces the handlers of both signals with its own, which
abort the process or exit with 0. Outside the main thread Python sets no handlers: there nothing changes.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, while the block runs."""
    with kept_handlers():
        _set(signal.SIGTERM, signal.default_int_handler)
        yield


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Undo what the block does to the handlers of SIGINT and SIGTERM."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            _set(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM while the block tidies up: a second Ctrl-C leaves no process behind."""
    with kept_handlers():
        for number in _STOPPING:
            _set(number, signal.SIG_IGN)
        yield


def _set(number: signal.Signals, handler: Handler) -> None:
    if threading.current_thread() is threading.main_thread() and handler is not None:  # None: set outside Python
        signal.signal(number, handler)
