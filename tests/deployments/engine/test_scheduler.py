"""The scheduler over its block pool: order, budget, prefix reuse, preemption, and its invariants under any load."""

from collections import Counter
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.kv_cache import BlockPool
from deployments.engine.request import SamplingParams
from deployments.engine.scheduler import Chunk, Scheduler
from deployments.engine.sequence import Sequence

BLOCK = 4


def new_sequence(
    token_ids: Tokens[int],
    adapter: str | None = None,
    *,
    max_tokens: int = 100,
    index: int = 0,
    prefix_donor: Sequence | None = None,
    prompt_logprobs: int | None = None,
) -> Sequence:
    return Sequence(
        request_id="",
        index=index,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens, prompt_logprobs=prompt_logprobs),
        adapter=adapter,
        prefix_donor=prefix_donor,
    )


def scheduler_of(num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK), max_num_seqs, budget)


def ran(scheduler: Scheduler, token: int = 7) -> list[tuple[Sequence, int, int]]:
    """One step: whoever has all tokens computed gets `token`. Returns (sequence, start, end) of each chunk."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        scheduler.mark_computed(chunk)
        if chunk.end == len(chunk.sequence.token_ids):
            chunk.sequence.token_ids.append(token)
    return [(chunk.sequence, chunk.start, chunk.end) for chunk in chunks]


def test_a_prompt_is_computed_in_chunks_of_the_budget_and_then_token_by_token() -> None:
    scheduler = scheduler_of(budget=16)
    a = new_sequence(range(40))
    scheduler.add(a)
    assert [ran(scheduler) for _ in range(5)] == [
        [(a, s, e)] for s, e in ((0, 16), (16, 32), (32, 40), (40, 41), (41, 42))
    ]


def test_a_new_request_is_in_the_next_step_and_a_long_prompt_does_not_stop_running_answers() -> None:
    scheduler = scheduler_of(budget=16)
    a, b = new_sequence(range(3)), new_sequence(range(100, 140))
    scheduler.add(a)
    ran(scheduler)
    scheduler.add(b)
    assert ran(scheduler) == [(a, 3, 4), (b, 0, 15)]
    assert ran(scheduler) == [(a, 4, 5), (b, 15, 30)]
    assert ran(scheduler) == [(a, 5, 6), (b, 30, 40)]
    assert ran(scheduler) == [(a, 6, 7), (b, 40, 41)]


def test_answers_run_even_where_there_are_more_than_the_budget() -> None:
    scheduler = scheduler_of(budget=2)
    sequences = [new_sequence([i]) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    ran(scheduler)
    ran(scheduler)
    assert ran(scheduler) == [(s, 2, 3) for s in sequences[:2]]
    scheduler._max_num_batched_tokens = 4
    ran(scheduler)
    scheduler._max_num_batched_tokens = 2
    scheduler.add(new_sequence([9]))
    assert [s for s, _, _ in ran(scheduler)] == sequences


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    scheduler = scheduler_of(num_blocks=7)
    a, large, small = new_sequence(range(9)), new_sequence(range(20, 36)), new_sequence([1])
    for sequence in (a, large, small):
        scheduler.add(sequence)
    assert ran(scheduler) == [(a, 0, 9)]
    assert ran(scheduler) == [(a, 9, 10)]
    scheduler.remove(a)
    assert ran(scheduler) == [(large, 0, 16)]
    assert ran(scheduler) == [(large, 16, 17), (small, 0, 1)]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    sequences = [new_sequence([i]) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    ran(scheduler)
    assert scheduler.running == sequences[:2]
    scheduler.remove(sequences[0])
    ran(scheduler)
    assert scheduler.running == sequences[1:]


def test_fits_is_what_the_pool_holds() -> None:
    scheduler = scheduler_of(num_blocks=3)
    assert scheduler.fits(12)
    assert not scheduler.fits(13)


def test_a_sequence_as_large_as_the_pool_runs_to_its_end() -> None:
    scheduler = scheduler_of(num_blocks=3, budget=4)
    a, b = new_sequence([1]), new_sequence(range(11))
    scheduler.add(a)
    scheduler.add(b)
    while len(a.token_ids) < 12:
        assert ran(scheduler)
    scheduler.remove(a)
    while len(b.token_ids) < 13:
        assert ran(scheduler)


def test_a_second_turn_computes_only_its_new_tokens() -> None:
    scheduler = scheduler_of(budget=100)
    first = new_sequence(range(50, 60))
    scheduler.add(first)
    for _ in range(3):
        ran(scheduler)
    scheduler.remove(first)
    second = new_sequence([*first.token_ids, 1, 2, 3])  # 10 + 3 + 3 tokens, of which 12 were computed
    scheduler.add(second)
    assert ran(scheduler) == [(second, 12, 16)]
    assert second.num_cached_tokens == 12
    assert (scheduler.prefix_cache_queries, scheduler.prefix_cache_hits) == (10 + 16, 12)


def test_the_last_token_of_a_cached_prompt_is_computed_all_the_same() -> None:
    scheduler = scheduler_of()
    a, b = new_sequence(range(8)), new_sequence(range(8))
    scheduler.add(a)
    ran(scheduler)
    scheduler.add(b)
    assert ran(scheduler) == [(a, 8, 9), (b, 4, 8)]
    assert b.num_cached_tokens == 4


@pytest.mark.promise("D10")
@pytest.mark.parametrize(("adapter", "other"), [(None, ""), (None, "a@v1"), ("a@v1", "a@v2"), ("a@v1", "b@v1")])
def test_nobody_gets_the_kv_of_another_adapter_or_version(adapter: str | None, other: str | None) -> None:
    scheduler = scheduler_of()
    a, b = new_sequence(range(8), adapter), new_sequence(range(8), other)
    scheduler.add(a)
    ran(scheduler)
    scheduler.add(b)
    assert ran(scheduler) == [(a, 8, 9), (b, 0, 8)]
    assert not set(a.block_table) & set(b.block_table)
    assert b.num_cached_tokens == 0


def test_a_prompt_to_be_scored_is_computed_whole_and_serves_others() -> None:
    scheduler = scheduler_of(budget=32)
    a, scored, b = (
        new_sequence(range(8)),
        new_sequence(range(12), prompt_logprobs=0),
        new_sequence(range(13)),
    )
    for sequence, start in ((a, 0), (scored, 0), (b, 12)):
        scheduler.add(sequence)
        assert ran(scheduler)[-1] == (sequence, start, sequence.num_prompt_tokens)
    assert scored.num_cached_tokens == 0


def test_further_answers_share_the_prompt_of_the_first() -> None:
    scheduler = scheduler_of(budget=8)
    first = new_sequence(range(10))
    others = [new_sequence(range(10), index=i, prefix_donor=first) for i in (1, 2)]
    later = new_sequence([5])
    for sequence in (first, *others, later):
        scheduler.add(sequence)
    assert ran(scheduler) == [(first, 0, 8)]
    assert ran(scheduler) == [(first, 8, 10), *((s, 8, 10) for s in others), (later, 0, 1)]
    assert len({tuple(s.block_table[:2]) for s in (first, *others)}) == 1
    assert len({s.block_table[2] for s in (first, *others)}) == 3
    assert [s.num_cached_tokens for s in (first, *others)] == [0, 8, 8]
    assert [s.prefix_donor for s in others] == [None, None]  # they never wait again, and keep nothing alive


def test_only_answers_that_still_wait_for_the_first_are_overtaken() -> None:
    scheduler = scheduler_of(budget=10)
    first = new_sequence(range(8))
    other = new_sequence(range(8), index=1, prefix_donor=first)
    later, last = new_sequence(range(20, 22)), new_sequence([5])
    for sequence in (first, other, later, last):
        scheduler.add(sequence)
    assert ran(scheduler) == [(first, 0, 8), (later, 0, 2)]
    assert list(scheduler.waiting) == [other, last]
    assert ran(scheduler) == [(first, 8, 9), (later, 2, 3), (other, 4, 8), (last, 0, 1)]


def test_answers_do_not_wait_for_a_prompt_that_has_no_block_to_share() -> None:
    scheduler = scheduler_of()
    first = new_sequence(range(4))
    other = new_sequence(range(4), index=1, prefix_donor=first)
    scheduler.add(first)
    scheduler.add(other)
    assert ran(scheduler) == [(first, 0, 4), (other, 0, 4)]


def test_answers_run_when_the_first_is_cancelled() -> None:
    scheduler = scheduler_of(budget=4)
    first = new_sequence(range(8))
    other = new_sequence(range(8), index=1, prefix_donor=first)
    scheduler.add(first)
    scheduler.add(other)
    ran(scheduler)
    scheduler.remove(first)
    assert ran(scheduler) == [(other, 4, 8)]


def test_when_blocks_run_out_the_youngest_yields_and_loses_no_token() -> None:
    scheduler = scheduler_of(num_blocks=6)
    old, young = new_sequence(range(7)), new_sequence(range(10, 17))
    scheduler.add(old)
    scheduler.add(young)
    while not young.num_preemptions:
        ran(scheduler)
    scheduler.add(new_sequence([9]))
    token_ids = list(young.token_ids)
    assert len(token_ids) > 7
    assert (young.block_table, young.num_computed) == ([], 0)
    assert scheduler.waiting[0] is young
    while len(old.token_ids) < 16:
        ran(scheduler)
        assert scheduler.waiting[0] is young
    scheduler.remove(old)
    (sequence, start, end), *_ = ran(scheduler)
    assert sequence is young
    assert (start, end) == (8, len(token_ids))  # what is still cached of its own is not computed again
    assert young.token_ids[: len(token_ids)] == token_ids
    assert young.num_cached_tokens == 0  # a preemption is no prefix reuse


def test_the_youngest_yields_to_nobody_but_itself_where_only_it_needs_a_block() -> None:
    scheduler = scheduler_of(num_blocks=5)
    old, young = new_sequence(range(8)), new_sequence(range(10, 16))
    scheduler.add(old)
    scheduler.add(young)
    assert ran(scheduler) == [(old, 0, 8), (young, 0, 6)]
    assert ran(scheduler) == [(old, 8, 9), (young, 6, 7)]
    assert ran(scheduler) == [(old, 9, 10), (young, 7, 8)]
    assert ran(scheduler) == [(old, 10, 11)]
    assert list(scheduler.waiting) == [young]


def test_an_answer_that_yields_to_an_older_prompt_is_not_in_the_step() -> None:
    scheduler = scheduler_of(num_blocks=5, budget=8)
    old, young = new_sequence(range(8)), new_sequence(range(20, 24))
    scheduler.add(old)
    ran(scheduler)
    scheduler.add(young)
    ran(scheduler)
    old.token_ids += range(6)  # as if several tokens of the old one were still to compute
    assert [chunk.sequence for chunk in scheduler.schedule()] == [old]
    assert list(scheduler.waiting) == [young]


def test_a_prompt_that_yields_to_an_older_prompt_is_not_in_the_step() -> None:
    scheduler = scheduler_of(num_blocks=5, budget=8)
    old, young = new_sequence(range(8)), new_sequence(range(20, 24))
    scheduler.add(old)
    ran(scheduler)
    scheduler.add(young)
    ran(scheduler)
    old.token_ids += range(6)
    young.token_ids += range(2)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [old]
    assert list(scheduler.waiting) == [young]
    assert young.block_table == []


def test_what_a_cancelled_step_computed_is_not_found() -> None:
    scheduler = scheduler_of()
    a, b = new_sequence(range(8)), new_sequence(range(8))
    scheduler.add(a)
    (chunk,) = scheduler.schedule()
    table = a.block_table
    scheduler.remove(a)
    assert len(table) == 2  # the step that runs still reads it
    scheduler.mark_computed(chunk)
    scheduler.add(b)
    assert ran(scheduler) == [(b, 0, 8)]


def test_a_step_that_did_not_run_is_scheduled_again() -> None:
    scheduler = scheduler_of(num_blocks=3)
    a = new_sequence(range(9))
    scheduler.add(a)
    scheduler.schedule()
    assert ran(scheduler) == [(a, 0, 9)]
    assert len(a.block_table) == 3


def test_removing_twice_is_as_removing_once() -> None:
    scheduler = scheduler_of(num_blocks=2)
    a, b = new_sequence([1]), new_sequence(range(8))
    for sequence in (a, b):
        scheduler.add(sequence)
    ran(scheduler)
    for sequence in (a, b, a, b):
        scheduler.remove(sequence)
    assert a.ended
    assert scheduler.schedule() == []
    assert scheduler._pool.num_free == 2


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
