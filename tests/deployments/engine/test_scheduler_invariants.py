"""What holds of the scheduler and its block pool under any load, whatever arrives, fails or is cancelled."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.kv_cache import BlockPool
from deployments.engine.scheduler import Chunk, Scheduler
from deployments.engine.sequence import Sequence
from tests.deployments.engine.test_scheduler import new_sequence


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    adapter: str | None
    max_tokens: int
    n: int
    prompt_logprobs: int | None


TEXT = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1]  # most prompts begin as it does
requests = st.builds(
    Request,
    prompt=st.builds(
        lambda num_shared, own: TEXT[:num_shared] + own,
        st.integers(0, len(TEXT)),
        st.lists(st.integers(0, 1), min_size=1, max_size=4),
    ),
    adapter=st.sampled_from([None, None, "", "a@v1", "a@v2"]),
    max_tokens=st.sampled_from([8, 12, 5, 2, 1]),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)


class Load(RuleBasedStateMachine):
    """Any order of arrivals, steps, failed steps and cancels, over a pool that is too small for them.

    `written` remembers, apart from the scheduler, what the KV at each place of each block was computed from: the
    adapter and all tokens up to there. A step may only build on places whose content is its own past.
    """

    @initialize(
        num_blocks=st.integers(1, 6) | st.integers(10, 20),
        block_size=st.sampled_from([2, 3, 4, 1]),
        max_num_seqs=st.sampled_from([4, 5, 6, 7, 8, 1]),
        budget=st.sampled_from([8, 10, 12, 16, 5, 1]),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, budget)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.written: dict[tuple[int, int], object] = {}
        self.alive: list[Sequence] = []
        self.arrived: list[Sequence] = []  # that never ran, in order of arrival
        self.first_of: dict[Sequence, Sequence] = {}
        self.tokens: dict[Sequence, list[int]] = {}  # that each must have
        self.cached: dict[Sequence, int] = {}  # tokens that each found when it first ran

    @rule(requests=st.lists(requests, min_size=1, max_size=4))
    def arrive(self, requests: list[Request]) -> None:
        room = self.pool.num_blocks * self.pool.block_size
        for request in requests:
            prompt = request.prompt[:room]
            max_tokens = min(request.max_tokens, room - len(prompt) + 1)
            assert self.scheduler.fits(len(prompt) + max_tokens - 1)
            first = None
            for index in range(request.n):
                sequence = new_sequence(
                    prompt,
                    request.adapter,
                    max_tokens=max_tokens,
                    index=index,
                    prefix_donor=first,
                    prompt_logprobs=None if index else request.prompt_logprobs,
                )
                if first is not None:
                    self.first_of[sequence] = first
                first = first or sequence
                self.scheduler.add(sequence)
                self.alive.append(sequence)
                self.arrived.append(sequence)
                self.tokens[sequence] = list(prompt)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), num_steps=st.integers(1, 8))
    def run_steps(self, data: st.DataObject, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(data.draw(st.lists(st.integers(0, 1), min_size=8, max_size=8)))
            self.blocks_are_accounted_for()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), during_a_step=st.booleans())
    def cancel(self, data: st.DataObject, during_a_step: bool) -> None:
        cancelled = data.draw(st.sampled_from(self.alive))
        chunks = self.scheduled() if during_a_step else []
        self.run(chunks)
        self.end(cancelled)
        self.advance(chunks, [0] * len(chunks))

    @precondition(lambda self: self.scheduler.running)
    @rule(is_rare=st.sampled_from([False, False, True]))
    def fail_a_step(self, is_rare: bool) -> None:
        for chunk in self.scheduled() if is_rare else ():
            for position in range(chunk.start, chunk.end):
                self.written[self.place(chunk.sequence, position)] = "part of a step that failed"
            self.end(chunk.sequence)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for _ in range(2000):
            if not self.alive:
                break
            self.step([0] * 8)
            self.blocks_are_accounted_for()
        assert not self.alive, "no progress"
        assert not self.scheduler.waiting
        assert not self.scheduler.running
        assert self.pool.num_free == self.pool.num_blocks

    def step(self, sampled: list[int]) -> None:
        chunks = self.scheduled()
        self.run(chunks)
        self.advance(chunks, sampled)

    def scheduled(self) -> list[Chunk]:
        """The next sequence to run must be the one that the rules name."""
        scheduler = self.scheduler
        was_running = list(scheduler.running)
        decoding = [s for s in was_running if len(s.token_ids) - s.num_computed == 1]
        num_preemptions = scheduler.num_preemptions
        chunks = scheduler.schedule()
        preempted = scheduler.num_preemptions > num_preemptions

        sequences = [chunk.sequence for chunk in chunks]
        assert len(set(sequences)) == len(sequences)
        assert set(sequences) <= set(scheduler.running)
        assert len(scheduler.running) <= self.max_num_seqs
        assert not self.alive or chunks
        for sequence in decoding:
            assert (sequence in sequences) == (sequence in scheduler.running)
        if not preempted:
            assert scheduler.running[: len(was_running)] == was_running
        else:  # the youngest was preempted, none admitted, the oldest kept
            assert scheduler.running == was_running[: len(scheduler.running)]
            assert scheduler.running
            assert (
                list(scheduler.waiting)[: len(was_running) - len(scheduler.running)]
                == was_running[len(scheduler.running) :]
            )
        for chunk in chunks:
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.num_tokens <= len(chunk.sequence.token_ids) - chunk.start
        decoded = [s for s in sequences if s in decoding]
        of_prompts = sum(chunk.num_tokens for chunk in chunks if chunk.sequence not in decoding)
        remaining = self.budget - len(decoded) - of_prompts
        assert of_prompts == 0 or remaining >= 0

        ready = [s for s in self.arrived if s not in self.first_of or self.shares(self.first_of[s])]
        admitted = [s for s in scheduler.running if s in self.arrived]
        assert admitted == ready[: len(admitted)]  # first come, first served
        requeued = [s for s in scheduler.waiting if s.num_preemptions]
        assert not (admitted and requeued)
        next_up = (requeued + [s for s in ready if s not in admitted])[:1]
        if next_up and not preempted and remaining > 0 and len(scheduler.running) < self.max_num_seqs:
            num_blocks = -(-len(next_up[0].token_ids) // self.pool.block_size)
            assert num_blocks + 1 > self.pool.num_free, "room, but not admitted"
        for sequence in admitted:
            self.arrived.remove(sequence)
            assert sequence.num_cached_tokens == sequence.num_computed < sequence.num_prompt_tokens
            self.cached[sequence] = sequence.num_cached_tokens
            if sequence.sampling.prompt_logprobs is not None:
                assert sequence.num_computed == 0
        return chunks

    def run(self, chunks: list[Chunk]) -> None:
        """The forward: every token sees its own past and nothing else; then its KV is written."""
        holders = Counter(block for s in self.scheduler.running for block in s.block_table)
        for chunk in chunks:
            for position in range(chunk.start):
                place = self.place(chunk.sequence, position)
                assert self.written.get(place) == self.content(chunk.sequence, position)
        new = [(self.place(c.sequence, position), c, position) for c in chunks for position in range(c.start, c.end)]
        assert len({place for place, _, _ in new}) == len(new)
        for (block, offset), chunk, position in new:
            assert holders[block] == 1, "a block that others read is written"
            self.written[block, offset] = self.content(chunk.sequence, position)

    def advance(self, chunks: list[Chunk], sampled: list[int]) -> None:
        for chunk, token in zip(chunks, sampled, strict=False):
            sequence = chunk.sequence
            self.scheduler.mark_computed(chunk)
            if sequence.ended or chunk.end < len(sequence.token_ids):
                continue
            sequence.token_ids.append(token)
            self.tokens[sequence].append(token)
            if sequence.num_output_tokens == sequence.sampling.max_tokens:
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        assert sequence.token_ids == self.tokens[sequence]
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)
        if sequence in self.arrived:
            self.arrived.remove(sequence)

    def shares(self, first: Sequence) -> bool:
        size = self.pool.block_size
        return first.ended or first.num_computed >= (first.num_prompt_tokens - 1) // size * size

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return sequence.block_table[position // size], position % size

    def content(self, sequence: Sequence, position: int) -> object:
        return sequence.adapter, tuple(self.tokens[sequence][: position + 1])

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        pool, size = self.pool, self.pool.block_size
        tables = [sequence.block_table for sequence in self.scheduler.running]
        users = Counter(block for table in tables for block in table)
        assert [users[block] for block in range(pool.num_blocks)] == pool._num_users
        free, idle = set(pool._free), set(pool._idle)
        assert len(free) == len(pool._free)
        assert sorted([*free, *idle, *users]) == list(range(pool.num_blocks))
        assert idle <= set(pool._keys)
        assert not free & set(pool._keys)
        assert {key: block for block, key in pool._keys.items()} == pool._published
        assert len(pool._keys) == len(pool._published)
        for sequence in self.alive:
            assert sequence.token_ids == self.tokens[sequence]
            assert (sequence in self.scheduler.running) != (sequence in self.scheduler.waiting)
            assert bool(sequence.block_table) == (sequence in self.scheduler.running)
            assert sequence.block_table or not sequence.num_computed
            assert sequence.num_cached_tokens == self.cached.get(sequence, 0)
            for i, block in enumerate(sequence.block_table):
                if users[block] > 1:
                    assert block in pool._keys
                    assert self.written[block, size - 1] == self.content(sequence, (i + 1) * size - 1)


Load.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_no_block_is_lost_leaked_or_wrongly_shared_whatever_comes = pytest.mark.promise("D10")(Load.TestCase)
