"""What a grammar cannot say of a JSON text: no key twice in an object, and no number without end.

A `JsonGuard` follows one JSON text and takes tokens out of the mask that the grammar allows. It reads bytes as they
come and needs no well-formed text, since the grammar sees to that.
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from deployments.engine.constraint import PackedMask
from deployments.text.vocabulary import Vocabulary

MAX_INTEGER_DIGITS = 18  # every such integer is an int64
MAX_DIGITS = 17  # of a number with a fraction: what float64 can tell apart
MAX_EXPONENT_DIGITS = 2  # every such number is finite in float64

_QUOTE, _BACKSLASH, _POINT = b'"'[0], b"\\"[0], b"."[0]
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST, _COMMA = b"{}[],"
_DIGITS = frozenset(b"0123456789")
_NUMBER_BYTES = frozenset(b"+-.0123456789eE")


@dataclass(slots=True)
class _Number:
    """How much of a number has been written."""

    digits: int = 0  # before the exponent
    exponent_digits: int = 0
    has_point: bool = False
    ends_with_point: bool = False
    has_exponent: bool = False

    @property
    def is_too_long(self) -> bool:
        """Whether it has too many digits, or a point that no digit could follow."""
        if self.exponent_digits > MAX_EXPONENT_DIGITS:
            return True
        needed = self.digits + self.ends_with_point
        return needed > (MAX_DIGITS if self.has_point else MAX_INTEGER_DIGITS)

    def append(self, byte: int) -> None:
        self.ends_with_point = byte == _POINT
        if byte in b"eE":
            self.has_exponent = True
        elif byte == _POINT:
            self.has_point = True
        elif byte in _DIGITS and self.has_exponent:
            self.exponent_digits += 1
        elif byte in _DIGITS:
            self.digits += 1


@dataclass(slots=True)
class _JsonText:
    """Where in a JSON text its end is."""

    containers: list[set[str] | None] = field(default_factory=list)  # open ones: keys of an object, None for a list
    expects_key: bool = False  # the next string is a key
    string: bytearray | None = None  # the string that is open, as it is written
    is_escaped: bool = False  # the next byte of the string belongs to an escape
    number: _Number | None = None
    has_fault: bool = False  # a key stands twice in its object, or a number is too long

    def copy(self) -> "_JsonText":
        number = self.number
        return _JsonText(
            [keys if keys is None else set(keys) for keys in self.containers],
            self.expects_key,
            None if self.string is None else bytearray(self.string),
            self.is_escaped,
            number and replace(number),
        )

    def append(self, text: bytes) -> None:
        """The text goes on with these bytes."""
        for byte in text:
            if self.string is not None:
                self._append_to_string(byte)
            elif byte in _NUMBER_BYTES and (self.number is not None or byte not in b"eE"):
                self.number = self.number or _Number()
                self.number.append(byte)
                self.has_fault |= self.number.is_too_long
            else:
                self.number = None
                self._append_outside(byte)

    @property
    def keys(self) -> set[str]:
        """The keys that the innermost open object has so far."""
        return (self.containers[-1] if self.containers else None) or set()

    def _append_to_string(self, byte: int) -> None:
        assert self.string is not None
        if self.is_escaped:
            self.is_escaped = False
        elif byte == _BACKSLASH:
            self.is_escaped = True
        elif byte == _QUOTE:
            if self.expects_key:
                self._add_key(_decoded(self.string))
            self.string = None
            return
        if self.expects_key:
            self.string.append(byte)

    def _add_key(self, key: str) -> None:
        self.has_fault |= key in self.keys
        keys = self.containers[-1] if self.containers else None
        if keys is not None:
            keys.add(key)
        self.expects_key = False

    def _append_outside(self, byte: int) -> None:
        if byte == _QUOTE:
            self.string = bytearray()
        elif byte == _OPEN_OBJECT:
            self.containers.append(set())
            self.expects_key = True
        elif byte == _OPEN_LIST:
            self.containers.append(None)
            self.expects_key = False
        elif byte in (_CLOSE_OBJECT, _CLOSE_LIST):
            if self.containers:
                self.containers.pop()
            self.expects_key = False
        elif byte == _COMMA:
            self.expects_key = bool(self.containers) and self.containers[-1] is not None


class JsonTokens:
    """Which tokens of a vocabulary can end a key or lengthen a number."""

    def __init__(self, vocabulary: Vocabulary, num_tokens: int) -> None:
        self.spelling = vocabulary.spelling
        self.ends_string: dict[bytes, list[int]] = {}  # by what stands before the first quote
        self.quoted: list[int] = []  # tokens with two quotes or more
        self.numeric: dict[bytes, list[int]] = {}  # by the bytes of a number that they begin with
        for token_id in range(num_tokens):
            spelling = vocabulary.spelling(token_id)
            before, quote, after = spelling.partition(b'"')
            if quote:
                self.ends_string.setdefault(before, []).append(token_id)
            if b'"' in after:
                self.quoted.append(token_id)
            rest = spelling.lstrip(bytes(_NUMBER_BYTES))
            if len(rest) < len(spelling):
                self.numeric.setdefault(spelling[: len(spelling) - len(rest)], []).append(token_id)
        self.most_digits = max((sum(byte in _DIGITS for byte in start) for start in self.numeric), default=0)


class JsonGuard:
    """Follows one JSON text and takes out of a mask what would repeat a key or lengthen a number too far."""

    def __init__(self, tokens: JsonTokens, text: _JsonText | None = None) -> None:
        self._tokens = tokens
        self._text = text or _JsonText()

    def copy(self) -> "JsonGuard":
        return JsonGuard(self._tokens, self._text.copy())

    def append(self, text: bytes) -> None:
        """The text goes on with these bytes."""
        self._text.append(text)

    def restrict(self, mask: PackedMask) -> PackedMask:
        """The mask without tokens that repeat a key or make a number too long.

        The mask as it is where nothing would be left: a schema may ask for a number that is longer.
        """
        forbidden = self._forbidden(mask)
        if not forbidden:
            return mask
        ids: npt.NDArray[np.int64] = np.array(forbidden)
        restricted = mask.copy()
        np.bitwise_and.at(restricted, ids >> 3, ~(1 << (ids & 7)).astype(np.uint8))
        return restricted if restricted.any() else mask

    def _forbidden(self, mask: PackedMask) -> list[int]:
        text, tokens = self._text, self._tokens
        forbidden = []
        if any(text.containers):  # an object that has a key
            forbidden += [token_id for token_id in tokens.quoted if _has(mask, token_id) and not self._fits(token_id)]
        if text.string is not None and text.expects_key and text.keys:
            forbidden += self._repeating()
        if text.number is not None and self._is_nearly_full(text.number):
            for start, token_ids in tokens.numeric.items():
                if not _fits(text, start):
                    forbidden += token_ids
        return forbidden

    def _repeating(self) -> list[int]:
        """Tokens that end the open key as one that the object has."""
        string, keys = self._text.string, self._text.keys
        assert string is not None
        ids: list[int] = []
        if self._text.is_escaped or _BACKSLASH in string:
            for rest, token_ids in self._tokens.ends_string.items():
                if _decoded(bytes(string) + rest) in keys:
                    ids += token_ids
            return ids
        begun = bytes(string)
        for key in keys:
            written = json.dumps(key, ensure_ascii=False)[1:-1].encode()
            if written.startswith(begun):
                ids += self._tokens.ends_string.get(written[len(begun) :], ())
        return ids

    def _is_nearly_full(self, number: _Number) -> bool:
        return number.has_exponent or number.digits + self._tokens.most_digits >= MAX_DIGITS

    def _fits(self, token_id: int) -> bool:
        return _fits(self._text, self._tokens.spelling(token_id))


def _fits(text: _JsonText, continuation: bytes) -> bool:
    extended = text.copy()
    extended.has_fault = False
    extended.append(continuation)
    return not extended.has_fault


def _has(mask: PackedMask, token_id: int) -> bool:
    return token_id >> 3 < len(mask) and bool(mask[token_id >> 3] >> (token_id & 7) & 1)


def _decoded(string: bytes | bytearray) -> str:
    """A string as JSON reads it; as it is written if it ends within an escape."""
    text = string.decode(errors="replace")
    try:
        return str(json.loads(f'"{text}"', strict=False)) if "\\" in text else text
    except ValueError:
        return text
