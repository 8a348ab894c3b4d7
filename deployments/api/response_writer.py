"""Text deltas -> a response of `/v1/responses`, and the events that stream it.

`ResponseWriter` has one output item open at a time: a text delta opens the message, and the last delta closes it. Knows
nothing of HTTP, prompts or replicas.
"""

import itertools
import time
import uuid
from collections.abc import Iterable

from deployments.api.logprobs import token_logprobs
from deployments.api.outputs import TextDelta
from deployments.api.response_input import new_item_id
from deployments.errors import error_response
from deployments.protocol.base import Usage
from deployments.protocol.chat import ChatTokenLogprob
from deployments.protocol.response_items import ItemStatus, OutputMessage, OutputText
from deployments.protocol.response_request import ResponseRequest
from deployments.protocol.responses import (
    ContentPartEvent,
    IncompleteDetails,
    InputTokensDetails,
    LifecycleEvent,
    OutputItemEvent,
    PlainFormat,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    SchemaFormat,
    StreamEvent,
    TextConfig,
    TextDeltaEvent,
    TextDoneEvent,
)
from deployments.text.vocabulary import Vocabulary


def new_response(body: ResponseRequest, model: str) -> ResponseObject:
    """A response in progress, with the settings of its request."""
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

    Attributes:
        response: as it is now; complete after `finish`.
    """

    def __init__(self, response: ResponseObject, vocabulary: Vocabulary) -> None:
        self.response = response
        self._vocabulary = vocabulary
        self._numbers = itertools.count()
        self._message: _OpenMessage | None = None
        self._is_cut = False

    def begin(self) -> list[StreamEvent]:
        """The events before the first delta."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def add(self, delta: TextDelta) -> list[StreamEvent]:
        """The events of a delta; those of the last one close the output."""
        events: list[StreamEvent] = []
        if self._message is None:
            self._message = _OpenMessage(len(self.response.output), self._numbers)
            self.response.output.append(self._message.item)
            events += self._message.opened()
        if delta.text or delta.tokens:
            events.append(self._message.extended(delta, self._vocabulary))
        if delta.finish_reason is not None:
            self._is_cut = delta.finish_reason == "length"
            events += self._message.closed("incomplete" if self._is_cut else "completed")
            self._message = None
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
        events = [] if self._message is None else self._message.closed("incomplete")
        self.response.completed_at = None
        self.response.status = "failed"
        self.response.incomplete_details = None
        self.response.error = ResponseError(code="server_error", message=error_response(error)[1].error.message)
        self.response.usage = _usage(usage)
        return [*events, self._lifecycle("response.failed")]

    def _lifecycle(self, event_type: str) -> StreamEvent:
        return LifecycleEvent.model_validate(
            {"type": event_type, "sequence_number": next(self._numbers), "response": self.response}
        )


class _OpenMessage:
    """A message while it is generated, which has one part: its text."""

    def __init__(self, output_index: int, numbers: "itertools.count[int]") -> None:
        self.item = OutputMessage(id=new_item_id(), status="in_progress", content=[])
        self._part = OutputText(text="")
        self._texts: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []
        self._output_index = output_index
        self._numbers = numbers

    def opened(self) -> list[StreamEvent]:
        return [self._item_event("response.output_item.added"), self._part_event("response.content_part.added")]

    def extended(self, delta: TextDelta, vocabulary: Vocabulary) -> StreamEvent:
        logprobs = token_logprobs(delta.tokens, vocabulary)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        return TextDeltaEvent(
            sequence_number=next(self._numbers),
            item_id=self.item.id,
            output_index=self._output_index,
            content_index=0,
            delta=delta.text,
            logprobs=logprobs,
        )

    def closed(self, status: ItemStatus) -> list[StreamEvent]:
        self._part = OutputText(text="".join(self._texts), logprobs=self._logprobs)
        self.item.content = [self._part]
        self.item.status = status
        done = TextDoneEvent(
            sequence_number=next(self._numbers),
            item_id=self.item.id,
            output_index=self._output_index,
            content_index=0,
            text=self._part.text,
            logprobs=self._part.logprobs,
        )
        return [
            done,
            self._part_event("response.content_part.done"),
            self._item_event("response.output_item.done"),
        ]

    def _item_event(self, event_type: str) -> StreamEvent:
        fields = {"type": event_type, "sequence_number": next(self._numbers)}
        return OutputItemEvent.model_validate(
            fields | {"output_index": self._output_index, "item": self.item.model_copy()}
        )

    def _part_event(self, event_type: str) -> StreamEvent:
        fields = {"type": event_type, "sequence_number": next(self._numbers), "item_id": self.item.id}
        place = {"output_index": self._output_index, "content_index": 0}
        return ContentPartEvent.model_validate(fields | place | {"part": self._part})


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
