"""StoredResponses: the one owner of stored responses, for all replicas of the API.

A single replica beside ChatIngress, LlamaModel and Ledger. Knows nothing of HTTP.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ray import serve

from deployments.config import StoredResponsesArgs
from deployments.head_replica import HEAD_REPLICA
from deployments.responses.store import Earlier, ResponseStore, StoredResponse, responses_path

_EVICTION_PERIOD_S = 60.0
_DAY_S = 24 * 60 * 60
_GIB = 2**30

_T = TypeVar("_T")

logger = logging.getLogger("ray.serve")


@serve.deployment(**HEAD_REPLICA)
class StoredResponses:
    """Responses on disk. Owners are ids of keys, and the empty string for callers without one."""

    def __init__(self, args: StoredResponsesArgs) -> None:
        self._store = ResponseStore(responses_path(), args.max_age_days * _DAY_S, int(args.max_gib * _GIB))
        self._lock = asyncio.Lock()
        self._evicted_at = -_EVICTION_PERIOD_S

    async def earlier(
        self, owner: str, previous_response_id: str | None, item_ids: Sequence[str], will_store: bool
    ) -> Earlier:
        """What a request names, before it is answered.

        Args:
            will_store: the response is to be stored; fails if that is not possible now.
        """

        def read() -> Earlier:
            if will_store:
                self._store.check()
            previous = None if previous_response_id is None else self._store.get(owner, previous_response_id)
            return Earlier(previous, [self._store.item(owner, item_id) for item_id in item_ids])

        return await self._in_turn(read)

    async def add(self, owner: str, response: StoredResponse) -> None:
        """Store a response; returns once it is on disk. A response that is sent twice is stored once."""
        await self._in_turn(lambda: self._store.add(owner, response))

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response, None if the owner has no such response."""
        return await self._in_turn(lambda: self._store.get(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response; False if the owner has no such response."""
        return await self._in_turn(lambda: self._store.delete(owner, response_id))

    async def check_health(self) -> None:
        """Called by Ray Serve every second: deletes what has become too old, also while there are no requests."""
        if time.monotonic() - self._evicted_at < _EVICTION_PERIOD_S:
            return
        self._evicted_at = time.monotonic()
        try:
            await self._in_turn(self._store.evict)
        except sqlite3.Error as error:
            logger.error("old responses could not be deleted, which will be tried again: %s", error)

    async def _in_turn(self, call: Callable[[], _T]) -> _T:
        async with self._lock:
            return await asyncio.to_thread(call)
