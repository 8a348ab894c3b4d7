"""Client of the stored responses in a replica of the API: what cannot be stored is a 503, never lost silently."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from deployments.auth.caller import Caller
from deployments.errors import NotReady
from deployments.responses.store import Earlier, StoredResponse

_READ_S = 3.0  # how long a request waits for a store that does not respond
_ADD_S = 15.0  # how long a complete response does: a store that died is back by then

logger = logging.getLogger("ray.serve")


class StoredResponsesClient:
    """One for each replica of the API. Every caller has the responses of its own key only.

    Every method raises NotReady if the store does not respond.

    Args:
        responses: Ray Serve's handle of `StoredResponses`.
    """

    def __init__(self, responses: Any) -> None:
        self._responses = responses

    async def earlier(
        self, caller: Caller, previous_response_id: str | None, item_ids: Sequence[str], *, will_store: bool
    ) -> Earlier:
        """What a request names of what is stored. With `will_store`, also whether its response can be stored."""
        arguments = (_owner(caller), previous_response_id, item_ids, will_store)
        return cast(Earlier, await _in_time(lambda: self._responses.earlier.remote(*arguments), _READ_S))

    async def add(self, caller: Caller, response: StoredResponse) -> None:
        """Store a response; returns once it is on disk. Tries again while the store is being restarted."""
        deadline = time.monotonic() + _ADD_S
        while True:
            try:
                await _in_time(lambda: self._responses.add.remote(_owner(caller), response), _ADD_S)
                return
            except NotReady:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def get(self, caller: Caller, response_id: str) -> StoredResponse | None:
        """The caller's response with this id."""
        reply = await _in_time(lambda: self._responses.get.remote(_owner(caller), response_id), _READ_S)
        return cast(StoredResponse | None, reply)

    async def delete(self, caller: Caller, response_id: str) -> bool:
        """Delete the caller's response; False if there is none with this id."""
        return cast(bool, await _in_time(lambda: self._responses.delete.remote(_owner(caller), response_id), _READ_S))


def _owner(caller: Caller) -> str:
    return caller.key_id or ""


async def _in_time(call: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
    try:
        return await asyncio.wait_for(call(), timeout_s)
    except Exception as error:
        logger.warning("the store of responses does not respond: %r", error)
        raise NotReady("stored responses are temporarily unavailable: try again, or send store: false") from error
