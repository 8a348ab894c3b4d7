"""The state of one answer while it is generated: its tokens, its KV blocks, and how its next token is sampled."""

from dataclasses import dataclass, field
from typing import Any

from deployments.engine.constraint import Constraint
from deployments.engine.request import SamplingParams


@dataclass(slots=True, eq=False)  # compared by identity, not token by token
class Sequence:
    """One answer of a request, as the scheduler and the engine track it.

    Attributes:
        index: index of the answer within its request.
        token_ids: prompt and answer so far; tokens are appended, never changed.
        adapter: key of an adapter version, None for the base.
        generator: random generator of the answer, None if it samples greedily.
        constraint: grammar that constrains the answer, advanced past `token_ids`.
        prefix_donor: an answer to the same prompt, whose KV this one shares once it is computed.
        num_computed: leading tokens whose KV is in the blocks of `block_table`.
        num_cached_tokens: prompt tokens that the prefix cache had when the sequence first ran.
        block_keys: prefix cache keys of the leading full blocks of `token_ids`, computed on demand.
        ended: whether the scheduler has removed it.
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
