"""Text deltas -> a response of `/v1/responses`, and the events that stream it.

`ResponseWriter` has one output item open at a time, of a kind in `open_items.py`. Knows nothing of HTTP, prompts or
replicas.
"""

import itertools
import time
import uuid
from collections.abc import Iterable

from deployments.api.logprobs import token_logprobs
from deployments.api.open_items import OpenCall, OpenItem, OpenMessage
from deployments.api.outputs import ScoredToken, TextDelta
from deployments.errors import error_response
from deployments.protocol.base import Usage
from deployments.protocol.response_items import ItemStatus
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import (
    FunctionTool,
    IncompleteDetails,
    InputTokensDetails,
    LifecycleEvent,
    PlainFormat,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    SchemaFormat,
    StreamEvent,
    TextConfig,
)
from deployments.text.tool_calls import AnswerPart, CallArguments, CallFormat, CallScanner, CallStart
from deployments.text.vocabulary import Vocabulary


def new_response(body: ResponseRequest, model: str) -> ResponseObject:
    """A response in progress, with the settings of its request."""
    choice = body.tool_choice or "auto"
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        prompt_cache_retention=body.prompt_cache_retention,
        safety_identifier=body.safety_identifier,
        store=body.store,
        temperature=body.temperature,
        text=TextConfig(format=_format(body), verbosity=body.text and body.text.verbosity),
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[FunctionTool.model_validate(tool.model_dump()) for tool in body.tools],
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        user=body.user,
        metadata=body.metadata,
    )


def to_sse(events: Iterable[StreamEvent]) -> str:
    """Events as they are sent."""
    return "".join(f"event: {event.type}\ndata: {event.model_dump_json()}\n\n" for event in events)


class ResponseWriter:
    """Writes one response: `begin`, `add` for every delta, `finish`, and last `end` or `fail`.

    Args:
        calls: how the response may call functions, None if it may not.

    Attributes:
        response: as it is now; complete after `finish`.
    """

    def __init__(self, response: ResponseObject, vocabulary: Vocabulary, calls: CallFormat | None = None) -> None:
        self.response = response
        self._vocabulary = vocabulary
        self._scanner = None if calls is None else CallScanner(calls)
        self._numbers = itertools.count()
        self._open: OpenItem | None = None
        self._unsent_tokens: list[ScoredToken] = []  # of text that is held back, or of none
        self._is_cut = False

    def begin(self) -> list[StreamEvent]:
        """The events before the first delta."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def add(self, delta: TextDelta) -> list[StreamEvent]:
        """The events of a delta; those of the last one close the output."""
        self._unsent_tokens += delta.tokens
        is_last = delta.finish_reason is not None
        events = [event for part in self._parts(delta.text, is_last) for event in self._extend(part)]
        if is_last:
            self._is_cut = delta.finish_reason == "length"
            if not self.response.output or (self._unsent_tokens and isinstance(self._open, OpenMessage)):
                events += self._extend("")
            events += self._close("incomplete" if self._is_cut and not self._call_is_complete() else "completed")
        return events

    def finish(self, usage: Usage) -> None:
        """Complete the response after the last delta."""
        self.response.completed_at = int(time.time())
        self.response.status = "incomplete" if self._is_cut else "completed"
        self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if self._is_cut else None
        self.response.usage = _usage(usage)

    def end(self) -> list[StreamEvent]:
        """The last event of a response that is finished."""
        return [self._lifecycle(f"response.{self.response.status}")]

    def fail(self, error: Exception, usage: Usage) -> list[StreamEvent]:
        """The last events of a response that is aborted; its output is what there is so far."""
        events = self._close("incomplete")
        self.response.completed_at = None
        self.response.status = "failed"
        self.response.incomplete_details = None
        self.response.error = ResponseError(code="server_error", message=error_response(error)[1].error.message)
        self.response.usage = _usage(usage)
        return [*events, self._lifecycle("response.failed")]

    def _parts(self, text: str, is_last: bool) -> list[AnswerPart]:
        """The text, and the calls in it, as far as they can be told apart."""
        if self._scanner is None:
            return [text] if text else []
        parts = [*self._scanner.push(text)]
        if is_last and (rest := self._scanner.flush()):
            parts.append(rest)
        return parts

    def _extend(self, part: AnswerPart) -> list[StreamEvent]:
        """Continue the open item, or close it and open the next."""
        index = len(self.response.output)
        if isinstance(part, CallStart):
            self._unsent_tokens = []  # what a call consists of is not reported
            return [*self._close("completed"), *self._begin(OpenCall(index, self._numbers, part.name))]
        if isinstance(part, CallArguments):
            assert isinstance(self._open, OpenCall)
            self._unsent_tokens = []
            return [self._open.extended(part.text, [])]
        events: list[StreamEvent] = []
        if not isinstance(self._open, OpenMessage):
            events = [*self._close("completed"), *self._begin(OpenMessage(index, self._numbers))]
        assert self._open is not None
        logprobs = token_logprobs(self._unsent_tokens, self._vocabulary)
        self._unsent_tokens = []
        if part or logprobs:
            events.append(self._open.extended(part, logprobs))
        return events

    def _begin(self, item: OpenItem) -> list[StreamEvent]:
        self._open = item
        self.response.output.append(item.item)
        return item.opened()

    def _close(self, status: ItemStatus) -> list[StreamEvent]:
        events = [] if self._open is None else self._open.closed(status)
        self._open = None
        return events

    def _call_is_complete(self) -> bool:
        return isinstance(self._open, OpenCall) and self._scanner is not None and not self._scanner.in_arguments

    def _lifecycle(self, event_type: str) -> StreamEvent:
        return LifecycleEvent.model_validate(
            {"type": event_type, "sequence_number": next(self._numbers), "response": self.response}
        )


def _format(body: ResponseRequest) -> PlainFormat | SchemaFormat:
    given = body.text_format
    if given.type != "json_schema":
        return PlainFormat(type=given.type)
    return SchemaFormat(
        name=given.name or "response",
        description=given.description,
        schema=given.schema_ or {},
        strict=given.strict,
    )


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
