"""Hashes, duplicates, the held-out split and weights, as arithmetic."""

import hashlib
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.split import find_duplicates, hash_content, hash_opening, hold_out, repeat_by_weight, seeded_hashes
from training.errors import DatasetError

few_hashes = st.lists(st.integers(0, 12), min_size=2, max_size=60).map(lambda values: np.array(values, dtype=np.uint64))


def test_an_opening_is_the_same_whatever_its_case_and_spaces() -> None:
    assert hash_opening("What  is\nthis? ") == hash_opening("what is THIS?")
    assert hash_opening("Stra\u00dfe") == hash_opening("STRASSE")
    assert hash_opening("what is this") != hash_opening("what is that")


def test_contents_differ_in_case_and_in_where_a_turn_ends() -> None:
    assert hash_content(["a  b", " c"]) == hash_content(["a b", "c "])
    assert hash_content(["a", "b c"]) != hash_content(["a b", "c"])
    assert hash_content(["a"]) != hash_content(["A"])
    assert hash_content(["e\u0301"]) == hash_content(["\u00e9"])  # one letter, written in two ways


def test_mixing_is_a_permutation_that_the_seed_chooses() -> None:
    hashes = np.arange(10_000, dtype=np.uint64)
    assert len(np.unique(seeded_hashes(hashes, 1))) == len(hashes)
    assert (seeded_hashes(hashes, 1) != seeded_hashes(hashes, 2)).all()
    assert abs(float((seeded_hashes(hashes, 1) >> np.uint64(63)).mean()) - 0.5) < 0.02
    # the finaliser's published first output for state 0 is that of 0x9e3779b97f4a7c15
    salt = int.from_bytes(hashlib.blake2b(b"7", digest_size=8).digest())
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64) - np.uint64(salt)
    assert seeded_hashes(state, 7).tolist() == [0xE220A8397B1DCDAF]


@given(few_hashes)
def test_duplicates_point_to_the_first_row_with_their_content(contents: np.ndarray) -> None:
    repeated, earliest = find_duplicates(contents)
    listed = contents.tolist()
    assert earliest.tolist() == [listed.index(value) for value in listed]
    assert repeated.tolist() == [listed.index(value) < at for at, value in enumerate(listed)]


@given(few_hashes, st.sampled_from([0.05, 0.1, 0.3, 0.5]), st.integers(0, 9))
def test_hold_out_keeps_groups_together_and_close_to_the_share(openings: np.ndarray, share: float, seed: int) -> None:
    if len(set(openings.tolist())) < 2:
        return
    held_out = hold_out(openings, share, seed)
    assert set(openings[held_out].tolist()).isdisjoint(openings[~held_out].tolist())
    assert 0 < held_out.sum() < len(openings)
    sizes = {side: np.unique(openings[mask], return_counts=True)[1] for side, mask in ((0, ~held_out), (1, held_out))}
    room = min(max(1, round(share * len(openings))), len(openings) - 1)
    if held_out.sum() <= room:  # as full as whole groups make it
        assert held_out.sum() + sizes[0].max() > room
    else:  # no group fits, so it is the smallest
        assert len(sizes[1]) == 1
        assert sizes[1][0] <= sizes[0].min()


@given(few_hashes, st.data(), st.integers(0, 9))
def test_hold_out_of_a_number_takes_whole_groups_until_there_are_so_many(
    openings: np.ndarray, data: st.DataObject, seed: int
) -> None:
    if len(set(openings.tolist())) < 2:
        return
    number = data.draw(st.integers(1, len(openings) - 1))
    try:
        held_out = hold_out(openings, number, seed)
    except DatasetError as error:  # all groups but the last are too few
        [most] = map(int, re.findall(r"set it to (\d+) or less", str(error)))
        assert most < number
        assert most <= hold_out(openings, most, seed).sum() < len(openings)
        return
    assert set(openings[held_out].tolist()).isdisjoint(openings[~held_out].tolist())
    assert number <= held_out.sum() < len(openings)
    if number > 1:
        fewer = hold_out(openings, number - 1, seed)
        assert not (fewer & ~held_out).any()
        assert fewer.sum() == held_out.sum() or fewer.sum() == number - 1  # no group more than it takes


def test_hold_out_of_single_rows_is_the_exact_number() -> None:
    openings = np.random.default_rng(0).integers(0, 2**63, 10_000, dtype=np.uint64)
    assert hold_out(openings, 200, 0).sum() == 200
    assert hold_out(openings, 1, 0).sum() == 1


@given(few_hashes, st.integers(0, 9))
def test_a_larger_share_holds_out_the_same_rows_and_more(openings: np.ndarray, seed: int) -> None:
    if len(set(openings.tolist())) < 2:
        return
    shares = [hold_out(openings, share, seed) for share in (0.01, 0.05, 0.1, 0.2, 0.35, 0.5)]
    for smaller, larger in itertools.pairwise(shares):
        assert not (smaller & ~larger).any()


def test_a_group_of_half_the_rows_does_not_keep_others_from_being_held_out() -> None:
    openings = np.array([7] * 500 + [*range(1000, 1500)], dtype=np.uint64)
    for seed in range(20):
        held_out = hold_out(openings, 0.1, seed)
        assert held_out.sum() == 100
        assert not held_out[:500].any()


def test_hold_out_of_single_rows_is_the_exact_share() -> None:
    openings = np.random.default_rng(0).integers(0, 2**63, 1_000_000, dtype=np.uint64)
    assert hold_out(openings, 0.1, 0).sum() == 100_000


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 1.5, 2.0, 3.3])
def test_weights_count_exactly_and_evenly(weight: float) -> None:
    contents = seeded_hashes(np.arange(500, dtype=np.uint64), 0)
    index = np.arange(100, 400)
    repeated = repeat_by_weight(index, contents, weight, seed=0)
    assert len(repeated) == round(weight * 300)
    _, counts = np.unique(repeated, return_counts=True)
    assert set(counts.tolist()) <= {int(weight), int(weight) + 1}
    assert set(repeated.tolist()) <= set(index.tolist())
    if weight % 1:
        assert not np.array_equal(repeated, repeat_by_weight(index, contents, weight, seed=1))
    assert len(repeat_by_weight(np.array([], dtype=np.int64), contents, weight, seed=0)) == 0
