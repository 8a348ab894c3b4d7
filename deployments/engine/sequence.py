"""One answer while it grows: its tokens, its KV blocks, and how its next token is chosen."""

from dataclasses import dataclass, field
from typing import Any

from deployments.engine.constraint import Constraint
from deployments.engine.request import SamplingParams


@dataclass(slots=True, eq=False)  # compared by identity, not token by token
class Sequence:
    """One answer of a request on its way through the engine.

    Attributes:
        index: which of the request's answers.
        token_ids: prompt and answer so far; tokens are appended, never changed.
        adapter: key of an adapter's version, None for the base.
        generator: what its tokens are drawn with.
        constraint: what its answer is held to, at the place after `token_ids`.
        prefix_donor: an answer to the same prompt, whose KV this one shares as soon as it is computed.
        num_computed: leading tokens whose KV is in the blocks of `block_table`.
        num_cached_tokens: tokens of the prompt that did not have to be computed when the sequence first ran.
        block_keys: of the full blocks of `token_ids`, as far as they were needed.
        ended: it was removed from the scheduler.
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    adapter: str | None
    generator: Any = None
    constraint: Constraint | None = None
    adapter_slot: int = -1
    prefix_donor: "Sequence | None" = None
    num_computed: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens
