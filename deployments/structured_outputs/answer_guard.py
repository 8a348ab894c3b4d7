"""Guards the JSON in an answer: all of it, or the arguments of its calls."""

from deployments.engine.constraint import PackedMask
from deployments.structured_outputs.grammar import Grammar
from deployments.structured_outputs.json_guard import JsonGuard, JsonTokens
from deployments.text.tool_calls import CallArguments, CallScanner, CallStart


class AnswerGuard:
    """Follows one answer, and restricts it wherever it writes JSON."""

    def __init__(self, tokens: JsonTokens, grammar: Grammar) -> None:
        self._tokens = tokens
        self._scanner = None if grammar.calls is None else CallScanner(grammar.calls)
        self._json = JsonGuard(tokens) if grammar.is_json else None

    def copy(self) -> "AnswerGuard":
        guard = object.__new__(AnswerGuard)
        guard._tokens = self._tokens
        guard._scanner = self._scanner and self._scanner.copy()
        guard._json = self._json and self._json.copy()
        return guard

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        text = self._tokens.spelling(token_id)
        if self._scanner is None:
            if self._json is not None:
                self._json.append(text)
            return
        for part in self._scanner.push(text.decode("latin-1")):  # one character for each byte
            if isinstance(part, CallStart):
                self._json = JsonGuard(self._tokens)
            elif self._json is not None:
                self._json.append((part.text if isinstance(part, CallArguments) else part).encode("latin-1"))
        if self._scanner.num_calls and not self._scanner.in_arguments:
            self._json = None

    def restrict(self, mask: PackedMask) -> PackedMask:
        """The mask without what JSON must not have where the answer is."""
        return mask if self._json is None else self._json.restrict(mask)
