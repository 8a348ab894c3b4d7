"""What a dataset row becomes before it is tokenized: a dialog, a text, a preference pair or an unpaired example."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from training.chat.messages import Message
from training.config.data_config import DatasetFormat

_EXCERPT_CHARS = 80


class BadRow(Exception):
    """A row that cannot be used; the message gives the reason and names the key, not the file."""


def raise_unexpected(where: str, expected: str, value: Any) -> NoReturn:
    """Raise BadRow for a value of the wrong form, with its first characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    raise BadRow(f"{where}: expected {expected}, got {text[:_EXCERPT_CHARS]}")


@dataclass(frozen=True, slots=True)
class Dialog:
    """Messages that end with an assistant turn; at least one assistant turn carries loss."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextExample:
    """A plain text; every token of it carries loss."""

    text: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A dialog that ends with a user turn, and a chosen and a rejected answer to it."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """A dialog that ends with a user turn, and an answer that is desirable (`label` is True) or not."""

    prompt: tuple[Message, ...]
    completion: Message
    label: bool


Example = Dialog | TextExample | PreferencePair | UnpairedExample


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """An example, the format it was read in, and the keys of the row that this format ignores.

    `unused_keys` are the row's own names, those inside messages as in `messages[].name`. Keys with an empty value do
    not count.
    """

    format: DatasetFormat
    example: Example
    unused_keys: frozenset[str]
