"""Which tokens may come next in an answer, so that its text matches a grammar: one `Constraint` per answer.

A constraint is asked for a token mask before sampling and advanced by every token that is appended. Knows nothing of
schemas or tokenizers, and needs no torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

PackedMask = npt.NDArray[np.uint8]  # bit i % 8 of byte i // 8 is token i


class ConstraintFault(Exception):
    """The answer cannot continue: the library hit one of its limits, or the grammar does not allow the token."""


class Guard(Protocol):
    """What a grammar cannot say: it follows an answer, and takes tokens out of the grammar's mask."""

    def copy(self) -> Self:
        """An independent guard of the same text."""

    def restrict(self, mask: PackedMask) -> PackedMask:
        """The mask without what is not wanted; empty only where the text may end, and then has to."""

    def accept(self, token_id: int) -> None:
        """The answer goes on with an allowed token."""


class Constraint:
    """A position in a grammar.

    Args:
        matcher: at that position; owned by this object.
        end_token_id: the matcher's token for the end of the text, which is not in the model's vocabulary.
        guard: of the same text; owned by this object.

    `allowed` and `accept` raise:
        ConstraintFault: the answer cannot continue.
    """

    def __init__(self, matcher: "LLMatcher", end_token_id: int, guard: Guard) -> None:
        self._matcher = matcher
        self._end_token_id = end_token_id
        self._guard = guard

    def copy(self) -> "Constraint":
        """An independent constraint at the same position."""
        return Constraint(self._matcher.deep_copy(), self._end_token_id, self._guard.copy())

    def allowed(self, stop_token_ids: Sequence[int] = ()) -> PackedMask | None:
        """A mask of the tokens that may come next, None if the text is complete.

        Args:
            stop_token_ids: tokens that end the answer; they are allowed wherever the text may end.
        """
        may_end = self._matcher.is_accepting()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8).copy()
        mask[self._end_token_id >> 3] &= 0xFF ^ (1 << (self._end_token_id & 7))
        if not mask.any():
            if not may_end:
                self._fail()
            return None
        mask = self._guard.restrict(mask)
        if not mask.any():
            return None
        if may_end:
            for token_id in stop_token_ids:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by an allowed token."""
        if not self._matcher.consume_token(token_id):
            self._fail()
        self._guard.accept(token_id)

    @property
    def complete(self) -> bool:
        """Whether no token can follow."""
        return self._matcher.is_stopped()

    def _fail(self) -> NoReturn:
        raise ConstraintFault(self._matcher.get_error().partition("\n")[0] or "no token can follow")
