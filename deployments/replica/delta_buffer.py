"""Deltas of one request on their way from the engine to whoever streams them."""

import asyncio
from collections.abc import Callable, Sequence

from deployments.engine.request import Delta, merged


class DeltaBuffer:
    """Hands on the first delta and the last at once; between them, what comes too soon gathers into one.

    A chunk costs processors about a millisecond on its way through Ray Serve, more than a token of a small model. With
    a pause that grows with the number of streams, a replica sends no more chunks than it has time for.

    Args:
        pause_s: asked after each delivery; how long to the next, at least.
    """

    def __init__(self, pause_s: Callable[[], float]) -> None:
        self._pause_s = pause_s
        self._loop = asyncio.get_running_loop()
        self._deltas: list[Delta] = []
        self._ready = asyncio.Event()
        self._due = 0.0  # in the loop's time
        self._timer: asyncio.TimerHandle | None = None

    def add(self, deltas: Sequence[Delta]) -> None:
        """Take in what a step made; on the event loop only."""
        self._deltas.extend(deltas)
        if self._loop.time() >= self._due or any(delta.finish_reason for delta in deltas):
            self._ready.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._ready.set)

    async def next(self) -> list[Delta]:
        """Wait for deltas that are due; at most one for each answer."""
        await self._ready.wait()
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken = merged(self._deltas)
        self._deltas.clear()
        self._due = self._loop.time() + self._pause_s()
        return taken
