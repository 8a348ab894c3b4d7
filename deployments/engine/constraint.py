"""Which tokens an answer may go on with, so that its text is of a grammar: one `Constraint` for each answer.

`deployments/structured_outputs/grammars.py` compiles them; the engine asks before it samples and tells every token that
it appends. Knows nothing of schemas or tokenizers, and needs no torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

PackedMask = npt.NDArray[np.uint8]  # bit i % 8 of byte i // 8 is token i


class ConstraintFault(Exception):
    """The grammar cannot follow the answer: it hit a limit of the library, or the token is not of the grammar."""


class Constraint:
    """A place in a grammar.

    Args:
        matcher: at that place; owned by this object.
        end_token_id: the matcher's sign for the end of the text, which is no token of the model.

    `allowed` and `accept` raise:
        ConstraintFault: there is no going on.
    """

    def __init__(self, matcher: "LLMatcher", end_token_id: int) -> None:
        self._matcher = matcher
        self._end_token_id = end_token_id

    def copy(self) -> "Constraint":
        """The same place, to go on from independently."""
        return Constraint(self._matcher.deep_copy(), self._end_token_id)

    def allowed(self, stop_token_ids: Sequence[int] = ()) -> PackedMask | None:
        """Tokens that may come next, None if the text is complete.

        Args:
            stop_token_ids: what ends the answer; they are allowed where the text may end.
        """
        may_end = self._matcher.is_accepting()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8).copy()
        mask[self._end_token_id >> 3] &= 0xFF ^ (1 << (self._end_token_id & 7))
        if not mask.any():
            if not may_end:
                self._fail()
            return None
        if may_end:
            for token_id in stop_token_ids:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        return mask

    def accept(self, token_id: int) -> None:
        """Go on over a token that was allowed."""
        if not self._matcher.consume_token(token_id):
            self._fail()

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    def _fail(self) -> NoReturn:
        raise ConstraintFault(self._matcher.get_error().partition("\n")[0] or "no token can follow")
