"""The routes of `/v1/responses`, without the generation: what comes before it and after it, and what is stored.

Knows nothing of models or replicas.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse

from deployments.accounting.request_record import RequestTrace
from deployments.api.openai_responses import peek_first, usage_of
from deployments.api.outputs import PromptOutput, TextDelta, merge_deltas
from deployments.api.response_input import ResponseInput, read_input, read_stored, referenced_ids, to_store
from deployments.api.response_writer import ResponseWriter, to_sse
from deployments.auth.caller import Caller
from deployments.errors import NotCancellable, ResponseNotFound, error_response
from deployments.protocol.response_items import ItemList
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import DeletedResponse, ResponseObject
from deployments.responses.client import StoredResponsesClient
from deployments.responses.store import Earlier, StoredResponse

Batches = AsyncGenerator[list[TextDelta], None]

logger = logging.getLogger("ray.serve")


class ResponsesApi:
    """One for each replica of the API. Every caller has the responses of its own key only."""

    def __init__(self, stored: StoredResponsesClient) -> None:
        self._stored = stored

    async def read_input(self, body: ResponseRequest, caller: Caller) -> ResponseInput:
        """The input of a request, with what it names of what is stored.

        Raises:
            PreviousResponseNotFound, ResponseNotFound: it is not stored.
            NotReady: the response could not be stored.
        """
        item_ids = referenced_ids(body)
        earlier = Earlier(None, ())
        if body.store or body.previous_response_id is not None or item_ids:
            earlier = await self._stored.earlier(caller, body.previous_response_id, item_ids, will_store=body.store)
        return await asyncio.to_thread(read_input, body, earlier)

    async def respond(
        self,
        writer: ResponseWriter,
        given: ResponseInput,
        output: PromptOutput,
        batches: Batches,
        body: ResponseRequest,
        caller: Caller,
        trace: RequestTrace,
    ) -> Response:
        """Generate the response, store it, and only then say that it is complete."""
        if body.stream:
            events = await peek_first(self._events(writer, given, output, batches, caller, trace))
            headers = {"cache-control": "no-cache"} | trace.headers
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        async with aclosing(batches):
            deltas = [delta async for batch in batches for delta in batch]

        def to_json() -> str:
            for delta in merge_deltas(deltas):
                writer.add(delta)
            writer.finish(usage_of([output]))
            return writer.response.model_dump_json()

        content = await asyncio.to_thread(to_json)  # log-probabilities of a long text take a while
        await self._store(writer.response, given, caller)
        return Response(content, media_type="application/json", headers=trace.headers)

    async def retrieve(self, response_id: str, caller: Caller) -> Response:
        """A stored response as JSON.

        Raises:
            ResponseNotFound: the caller has no such response.
        """
        stored = await self._get(response_id, caller)

        def to_json() -> str:
            response = ResponseObject.model_validate_json(stored.body)
            items = [read_stored(item) for item in stored.output_items]
            return response.model_copy(update={"output": items}).model_dump_json()

        return Response(await asyncio.to_thread(to_json), media_type="application/json")

    async def input_items(
        self, response_id: str, caller: Caller, *, limit: int, newest_first: bool, after: str | None
    ) -> ItemList:
        """A page of the items that a response was made from.

        Raises:
            ResponseNotFound: the caller has no such response.
            RequestValidationError: `after` is none of its items.
        """
        items = list((await self._get(response_id, caller)).input_items)
        if newest_first:
            items.reverse()
        ids = [item.id for item in items]
        if after is not None and after not in ids:
            problem = f"{after!r:.160} is not an item of this response: send the last_id of a page, or leave it out"
            raise RequestValidationError([{"type": "value_error", "loc": ("query", "after"), "msg": problem}])
        start = 0 if after is None else ids.index(after) + 1
        page = [read_stored(item) for item in items[start : start + limit]]
        return ItemList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=start + limit < len(items),
        )

    async def delete(self, response_id: str, caller: Caller) -> DeletedResponse:
        """Delete a stored response.

        Raises:
            ResponseNotFound: the caller has no such response.
        """
        if not await self._stored.delete(caller, response_id):
            raise _not_found(response_id)
        return DeletedResponse(id=response_id)

    async def cancel(self, response_id: str, caller: Caller) -> ResponseObject:
        """Refuse to cancel a response.

        Raises:
            ResponseNotFound: the caller has no such response.
            NotCancellable: it is complete, as all that are stored are.
        """
        await self._get(response_id, caller)
        raise NotCancellable(
            "Cannot cancel a synchronous response: it is complete; to end one that streams, close the connection"
        )

    async def _get(self, response_id: str, caller: Caller) -> StoredResponse:
        stored = await self._stored.get(caller, response_id)
        if stored is None:
            raise _not_found(response_id)
        return stored

    async def _events(
        self,
        writer: ResponseWriter,
        given: ResponseInput,
        output: PromptOutput,
        batches: Batches,
        caller: Caller,
        trace: RequestTrace,
    ) -> AsyncGenerator[str, None]:
        """Server-sent events, one string for each batch. An error before the first string is raised."""
        has_started = False
        events = to_sse(writer.begin())
        try:
            async with aclosing(batches):  # when the client disconnects, generation stops at once
                async for deltas in batches:
                    events += to_sse([event for delta in deltas for event in writer.add(delta)])
                    has_started = True
                    yield events
                    events = ""
            writer.finish(usage_of([output]))
            await self._store(writer.response, given, caller)
            last = writer.end()
        except Exception as error:
            if not has_started:
                raise
            logger.exception("response %s was aborted", writer.response.id)
            trace.status = error_response(error)[0]
            last = writer.fail(error, usage_of([output]))
        yield events + to_sse(last)

    async def _store(self, response: ResponseObject, given: ResponseInput, caller: Caller) -> None:
        def to_stored() -> StoredResponse:
            body = response.model_dump_json(exclude={"output"})
            return StoredResponse(response.id, body, given.items, [to_store(item) for item in response.output])

        if response.store:
            await self._stored.add(caller, await asyncio.to_thread(to_stored))


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id {response_id!r:.160} not found.")
