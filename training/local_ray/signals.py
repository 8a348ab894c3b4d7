"""SIGTERM and Ctrl-C: both raise KeyboardInterrupt in the driver, so that Ray shuts down in order.

Ray replaces the handlers of both signals with its own, which abort the process or exit with 0. Python cannot set
handlers outside the main thread; there, nothing in this module has an effect.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the block, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    with preserved_handlers():
        _set(signal.SIGTERM, signal.default_int_handler)
        yield


@contextlib.contextmanager
def preserved_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM after the block."""
    originals = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in originals.items():
            _set(number, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM in the block: a second Ctrl-C during cleanup would leave processes behind."""
    with preserved_handlers():
        for number in _SIGNALS:
            _set(number, signal.SIG_IGN)
        yield


def _set(number: signal.Signals, handler: Handler) -> None:
    if threading.current_thread() is threading.main_thread() and handler is not None:  # None: it was not set by Python
        signal.signal(number, handler)
