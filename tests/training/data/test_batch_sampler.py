"""Packing, and distributing the rows of a step to workers and micro-batches."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.data.batch_sampler import StepBatchSampler, StepLayout, distribute, pack

lengths_of_rows = st.lists(st.integers(1, 64), min_size=1, max_size=80)


@given(lengths_of_rows)
def test_packs_hold_every_row_once_within_the_capacity(lengths: list[int]) -> None:
    packs = pack(lengths, 64)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in packs)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 64) + 1 + len([n for n in lengths if n > 32])


@given(lengths_of_rows)
def test_each_row_goes_where_it_leaves_least_room(lengths: list[int]) -> None:
    """As many packs as a plain best-fit decreasing, and as full."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [free for free in room if free >= length]
        if fitting:
            room.remove(min(fitting))
        room.append((min(fitting) if fitting else 64) - length)
    assert sorted(64 - sum(lengths[row] for row in rows) for rows in pack(lengths, 64)) == sorted(room)


def test_400_000_rows_are_packed_in_no_time() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.9, 400_000).astype(int).clip(1, 2048)
    started = time.process_time()
    packs = pack(lengths, 2048)
    assert time.process_time() - started < 2.5  # 0.2 s; what is quadratic takes 6
    assert len(packs) <= 1.001 * lengths.sum() / 2048
    started = time.process_time()
    assert pack([*lengths], 2048) is packs  # once per process
    assert time.process_time() - started < 0.5


def test_packs_are_few() -> None:
    lengths = np.random.default_rng(0).integers(5, 300, 1000)
    assert len(pack(lengths, 512)) <= 1.02 * sum(lengths) / 512 + 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_parts_have_like_many_tokens_and_none_too_many_examples(tokens: list[int], num_parts: int) -> None:
    parts = distribute(tokens, num_parts)
    assert sorted(place for part in parts for place in part) == list(range(len(tokens)))
    assert max(map(len, parts)) <= -(-len(tokens) // num_parts)
    if len(tokens) >= num_parts:
        assert all(parts)


def rows_by_step(lengths: list[int], num_workers: int, per_device: int, epoch: int, grouped: bool) -> list[list[int]]:
    """All workers' rows of each step, from their micro-batches."""
    shape = StepLayout(12, num_workers, per_device)
    workers = [StepBatchSampler(lengths, None, shape, r, 7, group_by_length=grouped) for r in range(num_workers)]
    for worker in workers:
        worker.set_epoch(epoch)
    micro_batches = [list(worker) for worker in workers]
    assert {len(batches) for batches in micro_batches} == {len(workers[0])}
    steps: list[list[int]] = []
    for start in range(0, len(workers[0]), shape.accumulation):
        step_rows = [
            row for batches in micro_batches for batch in batches[start : start + shape.accumulation] for row in batch
        ]
        steps.append(sorted(step_rows))
        assert all(len(batch) <= per_device for batches in micro_batches for batch in batches)
    return steps


def test_a_step_has_the_same_rows_for_any_number_of_workers_and_micro_batches() -> None:
    lengths = [(7 * n) % 50 + 1 for n in range(103)]
    for grouped in (False, True):
        expected = rows_by_step(lengths, 1, 12, 0, grouped)
        assert sorted(row for step in expected for row in step) == list(range(103))
        for num_workers, per_device in ((1, 3), (2, 2), (3, 4), (4, 2), (5, 1)):
            assert rows_by_step(lengths, num_workers, per_device, 0, grouped) == expected
        assert rows_by_step(lengths, 1, 12, 1, grouped) != expected


def test_with_group_by_length_a_steps_rows_are_of_like_length() -> None:
    lengths = [(7 * n) % 50 + 1 for n in range(480)]

    def spread(grouped: bool) -> float:
        steps = rows_by_step(lengths, 1, 12, 0, grouped)
        return float(np.mean([np.ptp([lengths[row] for row in step]) for step in steps]))

    assert spread(True) < 0.3 * spread(False)


def test_packs_stay_together() -> None:
    lengths = [10, 20, 30, 40, 5]
    packs = pack(lengths, 50)
    batches = list(StepBatchSampler(lengths, packs, StepLayout(2, 1, 1), 0, 0))
    assert sorted(map(sorted, batches)) == sorted(map(sorted, packs))
