"""Dataset rows -> conversations -> tokenized rows, for training.

Rows come from JSONL files or a hub dataset, in one of three formats (messages, guanaco text,
prompt/completion). A row that cannot be used is an error or is skipped and listed, as `on_bad_row`
says; no row is ever cut. This module knows neither models nor torch.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from pydantic import BaseModel, ConfigDict, Field, field_validator

from training.chat_format import ChatFormat, Message, check_dialog
from training.errors import ChatFormatError, DatasetError

DatasetFormat = Literal["messages", "guanaco", "prompt_completion"]
OnBadRow = Literal["error", "skip"]

IGNORED_LABEL = -100  # the label that torch's cross entropy leaves out
_EXCERPT_CHARS = 80
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")
_ACCEPTED = (
    'accepted rows are {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}, '
    '{"text": "### Human: ... ### Assistant: ..."} and {"prompt": ..., "completion": ...}'
)


class DataConfig(BaseModel):
    """Where the conversations come from and how much of them is held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | list[str]
    """JSONL files, relative to the current directory, or hub dataset ids (`owner/name`)."""
    split: str = "train"
    """The split of a hub dataset."""
    format: Literal["auto", "messages", "guanaco", "prompt_completion"] = "auto"
    held_out: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the conversations that is kept for evaluation."""
    on_bad_row: OnBadRow = "error"
    max_rows: int | None = Field(default=None, ge=1)
    """Read only that many rows."""

    @field_validator("path")
    @classmethod
    def _named(cls, path: str | list[str]) -> str | list[str]:
        if not path or not all(path):
            raise ValueError("name a JSONL file, a list of them, or a hub dataset id")
        return path

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass(frozen=True, slots=True)
class Conversation:
    """One dialog that ends with an assistant turn; `source` is `file.jsonl:12` (lines count from 1)."""

    messages: tuple[Message, ...]
    source: str


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row left out under `on_bad_row: skip`."""

    source: str
    reason: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class LoadedData:
    """What `load_conversations` read.

    Attributes:
        conversations: the usable rows in order.
        num_rows: rows read, skipped ones included.
        skipped: the rows left out.
        sha256: of the bytes read, in order; a single file without `max_rows` has its `sha256sum` here.
        format: the formats found, e.g. `messages` or `guanaco, messages`.
    """

    conversations: list[Conversation]
    num_rows: int
    skipped: list[SkippedRow]
    sha256: str
    format: str


class TokenizedRow(TypedDict):
    """One conversation for the trainer; labels are -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


class PreferenceRow(TypedDict):
    """A prompt with a preferred and a rejected answer, for DPO."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class UnpairedRow(TypedDict):
    """A prompt with one answer and whether it is desirable, for KTO."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """What `tokenize` made, and the conversations it left out."""

    rows: list[TokenizedRow] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _RawRow:
    source: str
    content: bytes  # one JSON text


class _BadRow(Exception):
    """Why a row cannot be used."""


def load_conversations(config: DataConfig) -> LoadedData:
    """Read every row of the configured files or hub datasets.

    Raises:
        DatasetError: a file or hub dataset cannot be read, no row can be used, or a row is bad and
            `on_bad_row` is `error`.
    """
    conversations: list[Conversation] = []
    skipped: list[SkippedRow] = []
    formats: set[str] = set()
    num_rows = 0
    sha256 = hashlib.sha256()
    for row in _rows(config, sha256.update):
        num_rows += 1
        try:
            row_format, messages = _parse(row.content, config.format)
        except _BadRow as bad:
            excerpt = row.content[: 4 * _EXCERPT_CHARS].decode("utf-8", errors="replace")
            _refuse_or_skip(SkippedRow(row.source, str(bad), excerpt[:_EXCERPT_CHARS]), config.on_bad_row, skipped)
            continue
        conversations.append(Conversation(messages, row.source))
        formats.add(row_format)
    if not conversations:
        raise DatasetError(
            f"dataset {', '.join(config.paths)} has no usable row ({num_rows} read, {len(skipped)} skipped): "
            f"{_ACCEPTED}"
        )
    return LoadedData(conversations, num_rows, skipped, sha256.hexdigest(), ", ".join(sorted(formats)))


def split_held_out(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (train, held out), in the given order, by a hash of the content.

    Conversations that open with the same user message stay on one side, so no held-out question was
    trained on. Groups are held out in order of their hash as long as they fit into `fraction`: the
    result depends on nothing but content and seed. A fraction of 0 holds out nothing.

    Raises:
        DatasetError: there are too few different conversations for a row on each side.
    """
    if fraction == 0:
        return list(conversations), []
    groups: dict[str, list[int]] = defaultdict(list)
    for index, conversation in enumerate(conversations):
        groups[_opening_sha256(conversation, seed)].append(index)
    if len(groups) < 2:
        raise DatasetError(
            f"{len(conversations)} conversations with {len(groups)} different first user messages cannot be split into "
            "training and held-out rows: add different ones, or set data.held_out to 0"
        )
    room = max(1, round(fraction * len(conversations)))
    chosen: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(chosen) + len(group) <= room and len(chosen) + len(group) < len(conversations):
            chosen.update(group)
    if not chosen:
        chosen.update(min(groups.items(), key=lambda item: (len(item[1]), item[0]))[1])
    train = [c for index, c in enumerate(conversations) if index not in chosen]
    held_out = [c for index, c in enumerate(conversations) if index in chosen]
    return train, held_out


def tokenize(
    conversations: Sequence[Conversation], chat_format: ChatFormat, max_length: int, on_bad_row: OnBadRow = "error"
) -> TokenizedRows:
    """Render conversations to ids and labels; one that is longer than `max_length` tokens is a bad row.

    Raises:
        DatasetError: a row is bad and `on_bad_row` is `error`, or no row is left.
    """
    tokenized = TokenizedRows()
    for conversation in conversations:
        excerpt = conversation.messages[0].content[:_EXCERPT_CHARS] if conversation.messages else ""
        try:
            rendered = chat_format.render_training(conversation.messages)
        except ChatFormatError as error:
            bad = SkippedRow(conversation.source, f"is no dialog to learn from: {error}", excerpt)
            _refuse_or_skip(bad, on_bad_row, tokenized.skipped)
            continue
        if len(rendered.input_ids) > max_length:
            reason = f"is too long, {len(rendered.input_ids)} tokens with max_length {max_length}"
            _refuse_or_skip(SkippedRow(conversation.source, reason, excerpt), on_bad_row, tokenized.skipped)
            continue
        pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
        labels = [token_id if trained else IGNORED_LABEL for token_id, trained in pairs]
        tokenized.rows.append({"input_ids": rendered.input_ids, "labels": labels})
    if conversations and not tokenized.rows:
        raise DatasetError(
            f"all {len(conversations)} conversations were skipped, the first because {tokenized.skipped[0].source} "
            f"{tokenized.skipped[0].reason}: raise max_length or mend the rows"
        )
    return tokenized


def _refuse_or_skip(row: SkippedRow, on_bad_row: OnBadRow, skipped: list[SkippedRow]) -> None:
    if on_bad_row == "error":
        raise DatasetError(
            f"{row.source}: the row {row.reason}; it starts with {row.excerpt!r}; {_ACCEPTED}; "
            "mend it, or set data.on_bad_row to skip"
        )
    skipped.append(row)


def _opening_sha256(conversation: Conversation, seed: int) -> str:
    opening = next((m.content for m in conversation.messages if m.role == "user"), "")
    return hashlib.sha256(f"{seed}\0{opening.strip()}".encode()).hexdigest()


def _rows(config: DataConfig, seen: Callable[[bytes], None]) -> Iterator[_RawRow]:
    """The configured rows, at most `max_rows`; every byte read goes to `seen` once."""
    num_rows = 0
    for path in config.paths:
        for line, content in _lines(path, config.split):
            if num_rows == config.max_rows:
                return
            seen(content)
            if content.strip():
                num_rows += 1
                yield _RawRow(f"{path}:{line}", content.strip())


def _lines(path: str, split: str) -> Iterator[tuple[int, bytes]]:
    file = Path(path).expanduser()
    if file.is_file():
        yield from _file_lines(file)
    elif file.suffix not in (".jsonl", ".json") and _HUB_ID.fullmatch(path):
        yield from _hub_lines(path, split)
    else:
        raise DatasetError(
            f"dataset {path!r} is no file (in {Path.cwd()}) and no hub dataset id like 'owner/name': check data.path"
        )


def _file_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as lines:
            yield from enumerate(lines, start=1)
    except OSError as error:
        raise DatasetError(f"dataset {str(file)!r} cannot be read: {error.strerror or error}") from error


def _hub_lines(hub_id: str, split: str) -> Iterator[tuple[int, bytes]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(hub_id, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        first_line = str(error).partition("\n")[0]
        raise DatasetError(
            f"hub dataset {hub_id!r}, split {split!r}, cannot be loaded ({first_line}): check data.path "
            "and data.split, or name a JSONL file"
        ) from error
    for index, row in enumerate(dataset, start=1):
        yield index, (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()


def _parse(content: bytes, wanted: str) -> tuple[DatasetFormat, tuple[Message, ...]]:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadRow("is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _BadRow(f"is a JSON {type(row).__name__}, not an object")
    row_format = _format_of(row, wanted)
    messages = tuple(_READERS[row_format](row))
    try:
        check_dialog(messages, "assistant")
    except ChatFormatError as error:
        raise _BadRow(f"is no dialog to learn from: {error}") from error
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise _BadRow(f"has an empty answer in messages[{index}]")
    return row_format, messages


def _format_of(row: dict[str, Any], wanted: str) -> DatasetFormat:
    for row_format, keys in _KEYS.items():
        if wanted in ("auto", row_format) and all(row.get(key) is not None for key in keys):
            return row_format
    named = "any known format" if wanted == "auto" else f"format {wanted!r}"
    keys_found = [key if row[key] is not None else f"{key} (null)" for key in sorted(row)]  # hub rows fill up with null
    raise _BadRow(f"is not of {named}: it has the keys {', '.join(keys_found) or '(none)'}")


def _from_messages(row: dict[str, Any]) -> Iterator[Message]:
    yield from _messages(row["messages"], "messages")


def _from_guanaco(row: dict[str, Any]) -> Iterator[Message]:
    text = row["text"]
    if not isinstance(text, str):
        _wrong("text", "a string", text)
    before, *turns = _GUANACO_TURN.split(text)
    if before.strip() or not turns:
        raise _BadRow("has a text that does not start with '### Human:'")
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        yield Message("user" if speaker == "Human" else "assistant", content.strip())


def _from_prompt_completion(row: dict[str, Any]) -> Iterator[Message]:
    prompt, completion = row["prompt"], row["completion"]
    yield from [Message("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
    yield from (
        [Message("assistant", completion)] if isinstance(completion, str) else _messages(completion, "completion")
    )


def _messages(items: Any, key: str) -> Iterator[Message]:
    if not isinstance(items, list):
        _wrong(key, "a list of messages", items)
    for index, item in enumerate(items):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            _wrong(where, "an object with role and content", item)
        missing = [name for name in ("role", "content") if name not in item]
        if missing:
            raise _BadRow(f"has no {' and no '.join(missing)} in {where}: it has the keys {', '.join(sorted(item))}")
        if item.get("tool_calls") or item.get("function_call"):
            raise _BadRow(f"calls a tool in {where}: chat formats know text only")
        yield Message(item["role"], _content(item["content"], f"{where}.content"))


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _wrong(where, "a string or a list of text parts", content)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            _wrong(f"{where}[{index}]", 'a part {"type": "text", "text": "..."}', part)
        texts.append(text)
    return "".join(texts)


def _wrong(where: str, expected: str, found: Any) -> NoReturn:
    raise _BadRow(f"has in {where} {str(json.dumps(found))[:_EXCERPT_CHARS]}, expected {expected}")


_KEYS: dict[DatasetFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "guanaco": ("text",),
}

_READERS: dict[DatasetFormat, Callable[[dict[str, Any]], Iterator[Message]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "guanaco": _from_guanaco,
}
