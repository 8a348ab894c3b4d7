"""Finds the calls of tools in the text of an answer, as it comes.

Knows nothing of tokens and responses.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from training.chat.tools import CallSyntax


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How the answers to one request may call tools.

    Attributes:
        names: of the tools.
        only_first: an answer that does not begin with a call has none: it is JSON, whose strings may look like one.
    """

    syntax: CallSyntax
    names: tuple[str, ...]
    only_first: bool = False


@dataclass(frozen=True, slots=True)
class CallStart:
    """The next call of an answer: of this tool."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """JSON text that continues the arguments of the last call."""

    text: str


AnswerPart = str | CallStart | CallArguments  # str: text outside of calls


class CallScanner:
    """Splits one answer into text and calls. Text that may be the beginning of a call is held back.

    A text that only resembles a call, such as one of an unknown tool, is text.

    Attributes:
        num_calls: calls that have begun.
        in_arguments: whether the last call's arguments are not complete.
    """

    def __init__(self, call_format: CallFormat) -> None:
        syntax = call_format.syntax
        self._format = call_format
        openings = {f"{syntax.begin_tag}{syntax.begin}{name}{syntax.middle}": name for name in call_format.names}
        self._first_openings, self._next_openings = (
            openings | {lead + opening: name for opening, name in openings.items()} for lead in ("\n", syntax.separator)
        )
        self._ending = syntax.end + syntax.end_tag
        self._held = ""
        self._expected = ""  # the rest of a call whose arguments are complete
        self._depth = 0  # open braces and brackets of the arguments
        self._in_string = False
        self._is_escaped = False
        self._has_text = False
        self.num_calls = 0
        self.in_arguments = False

    def copy(self) -> "CallScanner":
        """An independent scanner at the same position."""
        return copy.copy(self)  # the values are immutable, or never changed

    def push(self, text: str) -> Iterator[AnswerPart]:
        """What these characters complete."""
        self._held += text
        while self._held:
            if self.in_arguments:
                yield CallArguments(self._take(self._end_of_arguments()))
            elif self._expected:
                is_expected = self._held[0] == self._expected[0]
                self._expected = self._expected[1:] if is_expected else ""
                self._take(1 if is_expected else 0)
            else:
                num_text, opening, name = self._next_opening()
                if num_text:
                    self._has_text = True
                    yield self._take(num_text)
                if not opening:
                    return
                self._take(len(opening))
                self.num_calls += 1
                self.in_arguments = True
                yield CallStart(name)

    @property
    def is_after_call(self) -> bool:
        """Whether a call is complete, and nothing stands after it."""
        return bool(self.num_calls) and not (self.in_arguments or self._expected or self._held)

    def flush(self) -> str:
        """Text held back at the end of the answer; the beginning of a call that was cut off is left out."""
        text = self._take(len(self._held))
        return "" if self.num_calls or self._format.syntax.trigger in text else text

    def _take(self, num_characters: int) -> str:
        taken, self._held = self._held[:num_characters], self._held[num_characters:]
        return taken

    def _next_opening(self) -> tuple[int, str, str]:
        """How many characters are text before anything that may be a call; then, if complete, its opening and name."""
        if self._format.only_first and self._has_text:
            return len(self._held), "", ""
        openings = self._next_openings if self.num_calls else self._first_openings
        first_characters = {opening[0] for opening in openings}
        for position, character in enumerate(self._held):
            if character in first_characters:
                rest = self._held[position:]
                for opening, name in openings.items():
                    if rest.startswith(opening):
                        return position, opening, name
                if any(opening.startswith(rest) for opening in openings):
                    return position, "", ""
            if self._format.only_first:
                break
        return len(self._held), "", ""

    def _end_of_arguments(self) -> int:
        """How many characters belong to the arguments."""
        for position, character in enumerate(self._held):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.in_arguments = False
                    self._expected = self._ending
                    return position + 1
        return len(self._held)
