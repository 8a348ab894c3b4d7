"""Continuous batching over a paged KV cache: which tokens of which sequences run in the engine's next step.

Running sequences get their one token first; what is left of the step's token budget goes to prompts in order of
arrival, cut into chunks where they do not fit. When blocks run out, the youngest sequence gives its blocks back and
is computed again later. Knows nothing of weights or sampling.
"""

from collections import deque
from dataclasses import dataclass

from deployments.engine.kv_cache import BlockPool, extend_block_keys
from deployments.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a sequence, to run in one step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.num_tokens


class Scheduler:
    """Sequences wait, run, and are removed. Not thread-safe.

    Args:
        max_num_seqs: sequences that run at once; more wait.
        max_num_batched_tokens: tokens of one step; exceeded only by sequences that need one token each.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; only these hold blocks
        self.num_preemptions = 0  # since the start, as the next two
        self.prefix_cache_queries = 0  # tokens of prompts that came to run
        self.prefix_cache_hits = 0  # of these, tokens that were cached

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence that grows to `num_tokens` can ever run."""
        return num_tokens <= self._pool.num_blocks * self._pool.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence that `fits`; it can be in the next step."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, wherever it is; also while a step with it runs."""
        sequence.ended = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; every token of them and before them has its place in the block tables.

        Empty only when no sequence is left. A sequence not yet `computed` since the last call is scheduled again.
        """
        chunks: list[Chunk] = []
        part_way: list[Sequence] = []
        num_preemptions = self.num_preemptions
        for sequence in self.running:  # a preemption shortens the list from its end, which is safe here
            start = sequence.num_computed
            num_new = len(sequence.token_ids) - start
            if num_new > 1:
                part_way.append(sequence)
            elif num_new and self._reserve(sequence, start + 1):
                chunks.append(Chunk(sequence, start, 1))
        budget = self._max_num_batched_tokens - len(chunks)
        for sequence in part_way:
            start = sequence.num_computed
            num_new = min(len(sequence.token_ids) - start, budget)
            preempted = not sequence.block_table
            if num_new > 0 and not preempted and self._reserve(sequence, start + num_new):
                chunks.append(Chunk(sequence, start, num_new))
                budget -= num_new
        if self.num_preemptions > num_preemptions:  # too few blocks for those that run: none for others
            return [chunk for chunk in chunks if chunk.sequence.block_table]
        return chunks + self._admit(budget)

    def mark_computed(self, chunk: Chunk) -> None:
        """The step with this chunk has run: its KV counts, and blocks that became full can be found by others."""
        sequence = chunk.sequence
        if sequence.ended:
            return
        sequence.num_computed = chunk.end
        size = self._pool.block_size
        first, end = chunk.start // size, chunk.end // size
        if first < end:
            extend_block_keys(sequence.block_keys, sequence.adapter, sequence.token_ids, size)
            for i in range(first, end):
                self._pool.publish(sequence.block_table[i], sequence.block_keys[i])

    def _admit(self, budget: int) -> list[Chunk]:
        """Start waiting sequences, first come, first served, while there is room."""
        chunks: list[Chunk] = []
        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if self._waits_for_prefix(sequence):
                passed_over.append(self.waiting.popleft())
                continue
            if not self._take_prefix(sequence):
                break
            sequence.prefix_donor = None
            self.running.append(self.waiting.popleft())
            start = sequence.num_computed
            num_new = min(len(sequence.token_ids) - start, budget)
            self._reserve(sequence, start + num_new)
            chunks.append(Chunk(sequence, start, num_new))
            budget -= num_new
        self.waiting.extendleft(reversed(passed_over))
        return chunks

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether the prompt's full blocks, all that can be shared, are still to be computed by another sequence."""
        first = sequence.prefix_donor
        size = self._pool.block_size
        return (
            first is not None and not first.ended and first.num_computed < (first.num_prompt_tokens - 1) // size * size
        )

    def _take_prefix(self, sequence: Sequence) -> bool:
        """Give a sequence the cached blocks it begins with; False, and none, if the pool has too few for the rest."""
        size = self._pool.block_size
        num_tokens = len(sequence.token_ids)
        if sequence.sampling.prompt_logprobs is None:  # which need the logits of the whole prompt
            extend_block_keys(sequence.block_keys, sequence.adapter, sequence.token_ids, size)
            # the last token is computed in any case: its logits give the next one
            sequence.block_table = self._pool.cached_prefix(sequence.block_keys[: (num_tokens - 1) // size])
        num_missing = -(-num_tokens // size) - len(sequence.block_table)
        spare = 1 if self.running else 0
        if num_missing + spare > self._pool.num_free:
            self._release(sequence)
            return False
        sequence.num_computed = len(sequence.block_table) * size
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix_cache_queries += sequence.num_prompt_tokens
            self.prefix_cache_hits += sequence.num_cached_tokens
        return True

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for so many tokens; False if it was itself the youngest and had to yield."""
        size = self._pool.block_size
        table = sequence.block_table
        while len(table) * size < num_tokens:
            block = self._pool.allocate()
            if block is not None:
                table.append(block)
            elif self._preempt_youngest() is sequence:
                return False
        return True

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []  # a new list: a step that runs may still read the old one
