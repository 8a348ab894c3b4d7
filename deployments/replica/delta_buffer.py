"""Buffers the deltas of one request between the engine and its stream."""

import asyncio
from collections.abc import Callable, Sequence

from deployments.engine.request import Delta, merged


class DeltaBuffer:
    """Delivers the first and last delta at once, and merges those in between to at most one delivery per pause.

    A chunk takes about a millisecond of CPU time on its way through Ray Serve, more than a token of a small model. With
    a pause that grows with the number of streams, a replica sends no more chunks than it has time for.

    Args:
        pause_s: called after each delivery; returns the minimum time until the next one, in seconds.
    """

    def __init__(self, pause_s: Callable[[], float]) -> None:
        self._pause_s = pause_s
        self._loop = asyncio.get_running_loop()
        self._deltas: list[Delta] = []
        self._ready = asyncio.Event()
        self._due = 0.0  # time of the next delivery, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def add(self, deltas: Sequence[Delta]) -> None:
        """Buffer the deltas of a step; must be called on the event loop."""
        self._deltas.extend(deltas)
        if self._loop.time() >= self._due or any(delta.finish_reason for delta in deltas):
            self._ready.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._ready.set)

    async def next(self) -> list[Delta]:
        """Wait until deltas are due and return them, at most one per answer."""
        await self._ready.wait()
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deltas = merged(self._deltas)
        self._deltas.clear()
        self._due = self._loop.time() + self._pause_s()
        return deltas
