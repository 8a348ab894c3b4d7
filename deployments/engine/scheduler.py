"""Continuous batching: which tokens of which sequences run in the next step.

Running sequences get their one token first; what is left of the step's token budget goes to prompts, in order
of arrival, cut into chunks where they do not fit. Knows nothing of weights or sampling.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from deployments.engine.llama import Chunk
from deployments.engine.lora import NO_ADAPTER
from deployments.engine.request import Delta, SamplingParams


@dataclass(slots=True, eq=False)  # compared by identity, not token by token
class Sequence:
    """One request on its way through the engine. `token_ids` is prompt and answer so far."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    adapter: str | None
    on_delta: Callable[[Delta], None]
    generator: torch.Generator | None
    adapter_slot: int = NO_ADAPTER
    row: int = -1
    num_computed: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class Scheduler:
    """Sequences wait for a row of the KV cache, run, and give it back."""

    num_rows: int
    max_num_batched_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    _free_rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free_rows = list(range(self.num_rows))

    def schedule(self) -> list[tuple[Sequence, Chunk]]:
        """The next step's chunks, those of several tokens first."""
        while self.waiting and self._free_rows:
            sequence = self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            self.running.append(sequence)
        decoding = [s for s in self.running if len(s.token_ids) - s.num_computed == 1]
        budget = self.max_num_batched_tokens - len(decoding)
        prefill: list[tuple[Sequence, Chunk]] = []
        for sequence in self.running:
            num_new = min(len(sequence.token_ids) - sequence.num_computed, budget)
            if num_new > 0 and sequence not in decoding:
                prefill.append((sequence, self._chunk(sequence, num_new)))
                budget -= num_new
        step = prefill + [(s, self._chunk(s, 1)) for s in decoding]
        return sorted(step, key=lambda scheduled: len(scheduled[1].token_ids) == 1)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its row."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free_rows.append(sequence.row)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @staticmethod
    def _chunk(sequence: Sequence, num_new: int) -> Chunk:
        start = sequence.num_computed
        return Chunk(sequence.row, start, sequence.token_ids[start : start + num_new])
