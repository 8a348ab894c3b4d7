"""Tokenized rows on disk: written once as a stream, then read in random order from a memory map.

A store is a directory of two Arrow files, which other programs can read too: `rows.arrow` holds what training needs
(token ids, trained spans, the text behind them), `index.arrow` the few numbers per row by which rows are selected. All
rows of a store are of one kind. Knows neither dataset formats nor tokenizers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.chat.messages import Message, Role, ToolCall

IGNORED_LABEL = -100  # `ignore_index` of torch's cross entropy
_BATCH_ROWS = 256  # row i is in batch i // _BATCH_ROWS
_TOKEN_LISTS = ("input_ids", "spans", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_ROWS_SCHEMA = pa.schema(
    [
        *((name, pa.list_(pa.uint32())) for name in _TOKEN_LISTS),
        ("label", pa.bool_()),
        ("location", pa.string()),
        ("messages", pa.string()),  # JSON: [[role, content, trained], ...]; null for a plain text
    ]
)
_INDEX_SCHEMA = pa.schema(
    [
        ("source", pa.uint16()),  # position in DataConfig.sources
        ("opening", pa.uint64()),  # hash of the first user message
        ("content", pa.uint64()),  # hash of the complete row
        ("length", pa.uint32()),  # tokens
        ("num_trained", pa.uint32()),  # tokens
    ]
)


class TokenizedRow(TypedDict):
    """One conversation for the trainer; labels are -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


class PreferenceRow(TypedDict):
    """A prompt and two answers to it, with the keys of TRL's DPOTrainer; answers end with the end of turn."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class UnpairedRow(TypedDict):
    """A prompt and an answer that is desirable or not, with the keys of TRL's KTOTrainer."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialog that ends with an assistant turn; `source` is its location, such as `file.jsonl:12`."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row to be written to a store.

    Attributes:
        tokens: lists of token ids by name; a TokenizedRow has `input_ids` and `spans`, which alternates begin and end
            of each trained span.
        label: of an UnpairedRow.
        messages: the dialog behind the tokens; None for a plain text.
        length: tokens that are in memory at the same time when the row is trained.
        num_trained: tokens that carry loss.
    """

    tokens: dict[str, list[int]]
    label: bool | None
    location: str
    messages: Sequence[Message] | None
    source: int
    opening: int
    content: int
    length: int
    num_trained: int


class StoreWriter:
    """Writes a store into an existing directory; buffers one batch in memory."""

    def __init__(self, directory: Path) -> None:
        self._rows = pa.ipc.new_file(str(directory / "rows.arrow"), _ROWS_SCHEMA)
        self._index = pa.ipc.new_file(str(directory / "index.arrow"), _INDEX_SCHEMA)
        self._batch: list[StoredRow] = []

    def append(self, row: StoredRow) -> None:
        """Add a row at the end."""
        self._batch.append(row)
        if len(self._batch) == _BATCH_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._batch:
            self._flush()
        self._rows.close()
        self._index.close()

    def _flush(self) -> None:
        rows: dict[str, list[Any]] = {name: [row.tokens.get(name) for row in self._batch] for name in _TOKEN_LISTS}
        rows["label"] = [row.label for row in self._batch]
        rows["location"] = [row.location for row in self._batch]
        rows["messages"] = [_to_json(row.messages) for row in self._batch]
        index = {name: [getattr(row, name) for row in self._batch] for name in _INDEX_SCHEMA.names}
        self._rows.write_batch(pa.RecordBatch.from_pydict(rows, _ROWS_SCHEMA))
        self._index.write_batch(pa.RecordBatch.from_pydict(index, _INDEX_SCHEMA))
        self._batch = []


class RowStore:
    """A store, opened for reading. Pickles as its path, so all processes map the same pages."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader = pa.ipc.open_file(pa.memory_map(str(directory / "rows.arrow")))
        self._batches: dict[int, dict[str, Any]] = {}
        with pa.memory_map(str(directory / "index.arrow")) as mapped:
            index = pa.ipc.open_file(mapped).read_all()
            columns = {name: index.column(name).to_numpy().copy() for name in _INDEX_SCHEMA.names}
        self.sources: NDArray[np.uint16] = columns["source"]
        self.openings: NDArray[np.uint64] = columns["opening"]
        self.contents: NDArray[np.uint64] = columns["content"]
        self.lengths: NDArray[np.uint32] = columns["length"]
        self.num_trained: NDArray[np.uint32] = columns["num_trained"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (self._directory,)

    def tokens(self, row: int, name: str) -> list[int] | None:
        """The row's list of token ids of that name; None if rows of its kind have no such list."""
        column, position = self._column(row, name)
        if column is None:
            return None
        offsets, values = column
        ids: list[int] = values[offsets[position] : offsets[position + 1]].tolist()
        return ids

    def row(self, row: int) -> dict[str, Any]:
        """The row with the keys of its TypedDict."""
        if (input_ids := self.tokens(row, "input_ids")) is not None:
            return {"input_ids": input_ids, "labels": _labels(input_ids, self.tokens(row, "spans") or [])}
        fields: dict[str, Any] = {"prompt_ids": self.tokens(row, "prompt_ids")}
        completion_ids = self.tokens(row, "completion_ids")
        if completion_ids is not None:
            return fields | {"completion_ids": completion_ids, "label": self._value(row, "label")}
        return fields | {name: self.tokens(row, name) for name in ("chosen_ids", "rejected_ids")}

    def location(self, row: int) -> str:
        """Where the row comes from, such as `file.jsonl:12`."""
        return str(self._value(row, "location"))

    def conversation(self, row: int) -> Conversation | None:
        """The dialog behind the row, with the chosen answer of a preference pair; None for a plain text."""
        text = self._value(row, "messages")
        if text is None:
            return None
        return Conversation(_from_json(text), self.location(row))

    def _value(self, row: int, name: str) -> Any:
        return self._batch(row)[name][row % _BATCH_ROWS].as_py()

    def _column(self, row: int, name: str) -> tuple[tuple[NDArray[np.int32], NDArray[np.uint32]] | None, int]:
        return self._batch(row)[name], row % _BATCH_ROWS

    def _batch(self, row: int) -> dict[str, Any]:
        """Views of one batch, created on first access; the data stays on disk, so keeping them costs little memory."""
        number = row // _BATCH_ROWS
        if number not in self._batches:
            batch = self._reader.get_batch(number)
            views: dict[str, Any] = {name: batch.column(name) for name in ("label", "location", "messages")}
            for name in _TOKEN_LISTS:
                column = batch.column(name)
                absent = column.null_count == len(column)
                views[name] = None if absent else (column.offsets.to_numpy(), column.values.to_numpy())
            self._batches[number] = views
        return self._batches[number]


RowT = TypeVar("RowT", TokenizedRow, PreferenceRow, UnpairedRow)


class Rows(Sequence[RowT], Generic[RowT]):
    """A selection of a store's rows, in any order and with repetitions; rows are read from disk on access.

    Attributes:
        numbers: row numbers in the store.
        lengths: tokens of each row.
    """

    def __init__(self, store: RowStore, numbers: NDArray[np.int64]) -> None:
        self.store = store
        self.numbers = numbers
        self.lengths: NDArray[np.int64] = store.lengths[numbers].astype(np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> RowT: ...
    @overload
    def __getitem__(self, at: slice) -> "Rows[RowT]": ...
    def __getitem__(self, at: int | slice) -> "RowT | Rows[RowT]":
        if isinstance(at, slice):
            return Rows(self.store, self.numbers[at])
        row: RowT = self.store.row(int(self.numbers[at]))  # type: ignore[assignment]
        return row

    def __iter__(self) -> Iterator[RowT]:
        return (self[at] for at in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.store, self.numbers)

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_trained_tokens(self) -> int:
        """Total number of tokens that carry loss."""
        return int(self.store.num_trained[self.numbers].sum(dtype=np.int64))

    def conversation(self, at: int) -> Conversation | None:
        """The dialog behind row `at`; None for a plain text."""
        return self.store.conversation(int(self.numbers[at]))


def trained_spans(loss_mask: Sequence[bool]) -> list[int]:
    """Begin and end of each run of True, alternating."""
    padded = np.concatenate(([False], np.asarray(loss_mask, dtype=bool), [False]))
    spans: list[int] = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return spans


def _labels(input_ids: list[int], spans: list[int]) -> list[int]:
    labels = [IGNORED_LABEL] * len(input_ids)
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        labels[begin:end] = input_ids[begin:end]
    return labels


def _to_json(messages: Sequence[Message] | None) -> str | None:
    if messages is None:
        return None
    return json.dumps([_fields(message) for message in messages], ensure_ascii=False)


def _fields(message: Message) -> list[Any]:
    fields = [message.role, message.content, message.trained]
    if message.tool_calls or message.tool_call_id or message.tools:
        calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
        fields += [calls, message.tool_call_id, message.tools]
    return fields


def _from_json(text: str) -> tuple[Message, ...]:
    return tuple(_message(*fields) for fields in json.loads(text))


def _message(
    role: Role,
    content: str,
    trained: bool,
    calls: Sequence[Sequence[str]] = (),
    tool_call_id: str = "",
    tools: Sequence[str] = (),
) -> Message:
    return Message(role, content, trained, tuple(ToolCall(*call) for call in calls), tool_call_id, tuple(tools))
