"""The scheduler over its block pool: order, budget, prefix reuse, preemption."""

from collections.abc import Sequence as Tokens

import pytest

from deployments.engine.kv_cache import BlockPool
from deployments.engine.request import SamplingParams
from deployments.engine.scheduler import Scheduler
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
