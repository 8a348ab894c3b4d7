"""Guards the JSON in an answer, all of it or the arguments of its calls, and ends an answer that repeats a call."""

import numpy as np

from deployments.engine.constraint import PackedMask
from deployments.structured_outputs.grammar import Grammar
from deployments.structured_outputs.json_guard import JsonGuard, JsonTokens
from deployments.text.tool_calls import CallArguments, CallScanner, CallStart


class AnswerGuard:
    """Follows one answer, and restricts it wherever it writes JSON.

    After a call that it has made before, with the same arguments, an answer has to end: small models repeat a call
    until the context is full if they must call something.
    """

    def __init__(self, tokens: JsonTokens, grammar: Grammar) -> None:
        self._tokens = tokens
        self._scanner = None if grammar.calls is None else CallScanner(grammar.calls)
        self._json = JsonGuard(tokens) if grammar.is_json else None
        self._calls: tuple[tuple[str, str], ...] = ()  # names and arguments

    def copy(self) -> "AnswerGuard":
        guard = object.__new__(AnswerGuard)
        guard._tokens = self._tokens
        guard._scanner = self._scanner and self._scanner.copy()
        guard._json = self._json and self._json.copy()
        guard._calls = self._calls
        return guard

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        spelling = self._tokens.spelling(token_id)
        if self._scanner is None:
            if self._json is not None:
                self._json.append(spelling)
            return
        for part in self._scanner.push(spelling.decode("latin-1")):  # one character for each byte
            if isinstance(part, CallStart):
                self._json = JsonGuard(self._tokens)
                self._calls = (*self._calls, (part.name, ""))
            elif self._json is not None:
                text = part if isinstance(part, str) else part.text
                self._json.append(text.encode("latin-1"))
                if isinstance(part, CallArguments):
                    *calls, (name, arguments) = self._calls
                    self._calls = (*calls, (name, arguments + text))
        if self._scanner.num_calls and not self._scanner.in_arguments:
            self._json = None

    def restrict(self, mask: PackedMask) -> PackedMask:
        """The mask without what JSON must not have where the answer is; empty after a repeated call."""
        if self._scanner is not None and self._scanner.is_after_call and self._calls[-1] in self._calls[:-1]:
            return np.zeros_like(mask)
        return mask if self._json is None else self._json.restrict(mask)
