"""Continuous batching over a paged KV cache: which tokens of which sequences run in the engine's next step.

Decoding sequences get their one token first; the rest of the step's token budget goes to prompts in order of arrival,
split into chunks where they do not fit. When blocks run out, the most recently admitted sequence is preempted: it
releases its blocks and is computed again later. Knows nothing of weights or sampling.
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
    """Holds the waiting and running sequences, and picks the tokens of each step. Not thread-safe.

    Args:
        max_num_seqs: maximum number of sequences that run at once; the others wait.
        max_num_batched_tokens: maximum number of tokens in one step; only decoding sequences, which need one token
            each, may exceed it.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; only these hold blocks
        self.num_preemptions = 0  # this counter and the next two count from the start
        self.prefix_cache_queries = 0  # prompt tokens of admitted sequences
        self.prefix_cache_hits = 0  # of these, the tokens found in the cache

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence that grows to `num_tokens` can ever run."""
        return num_tokens <= self._pool.num_blocks * self._pool.block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence that `fits`; it may be scheduled in the next step."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence for good, whether it waits or runs; allowed while a step with it runs."""
        sequence.ended = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; the block tables cover all of their tokens and all tokens before them.

        Empty only if no sequence is left. A chunk that was not passed to `mark_computed` is scheduled again.
        """
        chunks: list[Chunk] = []
        prefilling: list[Sequence] = []
        num_preemptions = self.num_preemptions
        for sequence in self.running:  # a preemption shortens the list from its end, which is safe here
            start = sequence.num_computed
            num_new = len(sequence.token_ids) - start
            if num_new > 1:
                prefilling.append(sequence)
            elif num_new and self._reserve(sequence, start + 1):
                chunks.append(Chunk(sequence, start, 1))
        budget = self._max_num_batched_tokens - len(chunks)
        for sequence in prefilling:
            start = sequence.num_computed
            num_new = min(len(sequence.token_ids) - start, budget)
            preempted = not sequence.block_table
            if num_new > 0 and not preempted and self._reserve(sequence, start + num_new):
                chunks.append(Chunk(sequence, start, num_new))
                budget -= num_new
        if self.num_preemptions > num_preemptions:  # running sequences are short of blocks: admit no others
            return [chunk for chunk in chunks if chunk.sequence.block_table]
        return chunks + self._admit(budget)

    def mark_computed(self, chunk: Chunk) -> None:
        """Record that the step with this chunk has run, and publish the blocks that it filled for reuse."""
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
        """Admit waiting sequences, first come, first served, while there is room."""
        chunks: list[Chunk] = []
        skipped: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if self._waits_for_prefix(sequence):
                skipped.append(self.waiting.popleft())
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
        self.waiting.extendleft(reversed(skipped))
        return chunks

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether its prefix donor has yet to compute the prompt's full blocks, which are all that can be shared."""
        donor = sequence.prefix_donor
        size = self._pool.block_size
        return (
            donor is not None and not donor.ended and donor.num_computed < (donor.num_prompt_tokens - 1) // size * size
        )

    def _take_prefix(self, sequence: Sequence) -> bool:
        """Give a sequence the cached blocks of its prefix; False, and none, if the pool has too few for the rest."""
        size = self._pool.block_size
        num_tokens = len(sequence.token_ids)
        if sequence.sampling.prompt_logprobs is None:  # prompt logprobs need the logits of the entire prompt
            extend_block_keys(sequence.block_keys, sequence.adapter, sequence.token_ids, size)
            # the last token is always computed: its logits predict the next one
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
        """Allocate blocks for the first `num_tokens` of a running sequence; False if it was preempted instead."""
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
        sequence.block_table = []  # a new list: a running step may still read the old one
