"""Output items of a response while they are generated, and their events. One kind of item is one class here."""

import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence

from deployments.api.response_input import new_item_id
from deployments.protocol.chat import ChatTokenLogprob
from deployments.protocol.response_items import FunctionCallItem, ItemStatus, OutputItem, OutputMessage, OutputText
from deployments.protocol.responses import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ContentPartEvent,
    OutputItemEvent,
    StreamEvent,
    TextDeltaEvent,
    TextDoneEvent,
)


class OpenItem(ABC):
    """One item: `opened`, `extended` any number of times, `closed`.

    Args:
        output_index: of the item in the response's output.
        numbers: gives every event of the response its number.

    Attributes:
        item: complete once it is closed; its events have copies.
    """

    item: OutputItem

    def __init__(self, output_index: int, numbers: "itertools.count[int]") -> None:
        self._output_index = output_index
        self._numbers = numbers
        self._texts: list[str] = []

    def opened(self) -> list[StreamEvent]:
        """The events before the first text."""
        return [self._item_event("response.output_item.added")]

    @abstractmethod
    def extended(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> StreamEvent:
        """The event of text that continues the item."""

    @abstractmethod
    def closed(self, status: ItemStatus) -> list[StreamEvent]:
        """The events after the last text."""

    def _item_event(self, event_type: str) -> StreamEvent:
        fields = {"type": event_type, "sequence_number": next(self._numbers)}
        return OutputItemEvent.model_validate(
            fields | {"output_index": self._output_index, "item": self.item.model_copy()}
        )


class OpenMessage(OpenItem):
    """A message, which has one part: its text."""

    item: OutputMessage

    def __init__(self, output_index: int, numbers: "itertools.count[int]") -> None:
        super().__init__(output_index, numbers)
        self.item = OutputMessage(id=new_item_id("msg"), status="in_progress", content=[])
        self._part = OutputText(text="")
        self._logprobs: list[ChatTokenLogprob] = []

    def opened(self) -> list[StreamEvent]:
        """The message and its part begin."""
        return [*super().opened(), self._part_event("response.content_part.added")]

    def extended(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> StreamEvent:
        """More text."""
        self._texts.append(text)
        self._logprobs += logprobs
        return TextDeltaEvent(
            sequence_number=next(self._numbers),
            item_id=self.item.id,
            output_index=self._output_index,
            content_index=0,
            delta=text,
            logprobs=[*logprobs],
        )

    def closed(self, status: ItemStatus) -> list[StreamEvent]:
        """The text, the part and the message end."""
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
        return [done, self._part_event("response.content_part.done"), self._item_event("response.output_item.done")]

    def _part_event(self, event_type: str) -> StreamEvent:
        fields = {"type": event_type, "sequence_number": next(self._numbers), "item_id": self.item.id}
        place = {"output_index": self._output_index, "content_index": 0}
        return ContentPartEvent.model_validate(fields | place | {"part": self._part})


class OpenCall(OpenItem):
    """A call of a function, whose text is its arguments."""

    item: FunctionCallItem

    def __init__(self, output_index: int, numbers: "itertools.count[int]", name: str) -> None:
        super().__init__(output_index, numbers)
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        self.item = FunctionCallItem(
            id=new_item_id("fc"), status="in_progress", call_id=call_id, name=name, arguments=""
        )

    def extended(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> StreamEvent:
        """More of the arguments, whose tokens are not reported."""
        self._texts.append(text)
        return ArgumentsDeltaEvent(
            sequence_number=next(self._numbers), item_id=self.item.id, output_index=self._output_index, delta=text
        )

    def closed(self, status: ItemStatus) -> list[StreamEvent]:
        """The arguments and the call end."""
        self.item.arguments = "".join(self._texts)
        self.item.status = status
        done = ArgumentsDoneEvent(
            sequence_number=next(self._numbers),
            item_id=self.item.id,
            output_index=self._output_index,
            name=self.item.name,
            arguments=self.item.arguments,
        )
        return [done, self._item_event("response.output_item.done")]
