"""What a row of a dataset becomes before it is tokenized: a dialog, a text, a preference pair or a rated answer."""

from dataclasses import dataclass

from training.chat.messages import Message
from training.config.data_config import DatasetFormat


class BadRow(Exception):
    """Why a row cannot be used: continues the words "the row"."""


@dataclass(frozen=True, slots=True)
class Dialog:
    """Messages that end with an assistant turn; at least one assistant turn is trained."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text that is trained whole."""

    text: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A dialog that ends with a user turn, a better answer to it and a worse one."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """A dialog that ends with a user turn, and an answer that is wanted (`label`) or not."""

    prompt: tuple[Message, ...]
    completion: Message
    label: bool


Example = Dialog | TextExample | PreferencePair | UnpairedExample


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """What a row teaches, the format that it was found to have, and which of its keys say nothing to that format.

    `unused_keys` are the row's own names, those of a message as in `messages[].name`; keys without a value are no keys.
    """

    format: DatasetFormat
    example: Example
    unused_keys: frozenset[str]
