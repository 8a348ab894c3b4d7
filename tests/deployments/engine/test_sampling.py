"""How every request samples its next token, independently of the rest of the batch."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine import sampling
from deployments.engine.request import MAX_LOGPROBS, SamplingParams
from deployments.engine.sampling import SamplingRow, random_stream, sample, token_logprobs

VOCAB_SIZE = 300  # more than one block of the running sums
GREEDY = SamplingParams(max_tokens=1, temperature=0)
RANDOM = SamplingParams(max_tokens=1, seed=0)


def logits_of(seed: int, vocab_size: int = VOCAB_SIZE, num_rows: int = 1) -> torch.Tensor:
    """Logits with many ties, [num_rows, vocab_size]."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.where(torch.arange(vocab_size) % 3 == 0, logits.round(), logits)


def row_of(params: SamplingParams, token_ids: list[int] | None = None, num_prompt_tokens: int = 0) -> SamplingRow:
    return SamplingRow(params, token_ids or [], num_prompt_tokens, random_stream(params))


def picked(logits: list[float], params: SamplingParams, token_ids: list[int] | None = None, num_prompt: int = 0) -> int:
    return sample(torch.tensor([logits]), [row_of(params, token_ids, num_prompt)])[0]


def draws(logits: torch.Tensor, row: SamplingRow, n: int) -> Counter[int]:
    return Counter(sample(logits.expand(n, -1), [row] * n))


def expected_probabilities(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """The parameters' definition, step by step over the full vocabulary in double precision."""
    params, answer = row.params, row.token_ids[row.num_prompt_tokens :]
    values = logits[0].double()
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    if len(answer) < params.min_tokens and not params.ignore_eos:
        values[list(params.stop_token_ids)] = -math.inf
    for token_id in set(row.token_ids):
        value, penalty = values[token_id], params.repetition_penalty
        values[token_id] = value / penalty if value > 0 else value * penalty
    for token_id, count in Counter(answer).items():
        values[token_id] -= params.presence_penalty + params.frequency_penalty * count
    probabilities, token_ids = (values / params.temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities < params.min_p * probabilities[0]] = 0
    if params.top_k:
        probabilities[params.top_k :] = 0
    probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum(-1) - probabilities >= params.top_p] = 0
    return torch.zeros_like(values).scatter(0, token_ids, probabilities / probabilities.sum())


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.0},
    {"top_p": 0.95},
    {"top_p": 0.5, "temperature": 1.7},
    {"top_p": 0.3},
    {"top_p": 0.1, "temperature": 2.0},
    {"top_k": 12},
    {"top_k": VOCAB_SIZE + 5},
    {"min_p": 0.05},
    {"min_p": 1e-9, "top_k": VOCAB_SIZE},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 1.4},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "top_p": 0.9},
    {"logit_bias": ((3, 6.0), (7, -100.0)), "min_tokens": 9, "stop_token_ids": (11, 12), "temperature": 1.5},
]


@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_draws_follow_the_probabilities_that_the_parameters_leave(changes: dict[str, float]) -> None:
    logits, n = logits_of(1), 8_000
    row = row_of(replace(RANDOM, **changes), token_ids=[1, 2, 3, 3, 5, 5, 5, 8], num_prompt_tokens=3)
    expected, counts = expected_probabilities(logits, row), draws(logits, row, n)
    assert all(expected[token] > 0 for token in counts)
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(probability * (1 - probability) / n)
        assert abs(counts[token] / n - probability) <= 5 * deviation + 2 / n


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert random_stream(GREEDY) is None
    assert picked([0.0, 3.0, 3.0, -1.0], GREEDY) == 1


def test_top_k_1_and_tiny_top_p_and_full_min_p_are_greedy() -> None:
    logits = logits_of(2, 49_152)
    likeliest = int(logits.argmax())
    for changes in ({"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert set(draws(logits, row_of(replace(RANDOM, temperature=2.0, **changes)), 20)) == {likeliest}


@pytest.mark.parametrize("changes", [{"top_p": 0.5}, {"top_p": 0.49}, {"top_k": 500}])
def test_of_equally_likely_tokens_only_so_many_are_kept(changes: dict[str, float]) -> None:
    counts = draws(torch.zeros(1, 1000), row_of(replace(RANDOM, **changes)), 3000)
    assert max(counts) == (489 if changes == {"top_p": 0.49} else 499)


@pytest.mark.parametrize("changes", [{"top_p": 0.4}, {"top_k": 700}, {"min_p": 1e-4, "top_p": 0.999}])
def test_looking_at_the_likeliest_first_draws_what_a_full_sort_draws(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = logits_of(3, 5000)
    params = replace(RANDOM, temperature=1.3, **changes)
    drawn = sample(logits.expand(300, -1), [row_of(replace(params, seed=i)) for i in range(300)])
    monkeypatch.setattr(sampling, "_REACHES", (math.inf,))
    assert sample(logits.expand(300, -1), [row_of(replace(params, seed=i)) for i in range(300)]) == drawn


def test_banned_tokens_are_never_drawn_even_when_nearly_all_are_banned() -> None:
    logits = torch.full((1, VOCAB_SIZE), -math.inf)
    logits[0, [7, 290]] = torch.tensor([1.0, 1.5])
    for changes in FILTERS[:11]:
        assert set(draws(logits, row_of(replace(RANDOM, **changes)), 200)) <= {7, 290}


def test_a_seed_fixes_the_draws_and_answer_i_draws_as_seed_plus_i() -> None:
    logits = logits_of(4).expand(50, -1)

    def drawn(seed: int | None, index: int = 0) -> list[int]:
        stream = random_stream(replace(RANDOM, seed=seed), index)
        return sample(logits, [SamplingRow(RANDOM, [], 0, stream)] * 50)

    assert drawn(7) == drawn(7) == drawn(5, index=2)
    assert drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)
    for seed in (-(2**63), -1, 2**63 - 1):
        assert drawn(seed, index=7) == drawn(seed, index=7) != drawn(seed)


def test_repetition_penalty_counts_a_seen_token_once_prompt_and_answer() -> None:
    params = replace(GREEDY, repetition_penalty=1.2)
    assert picked([3.0, 2.9, 2.4], params, token_ids=[0, 0, 0], num_prompt=2) == 1  # 3.0 / 1.2 = 2.5
    assert picked([3.0, 2.9, 2.6], params, token_ids=[0, 1], num_prompt=2) == 2
    assert picked([-1.0, -1.1], params, token_ids=[0], num_prompt=0) == 1  # -1.0 * 1.2


def test_presence_and_frequency_penalties_look_at_the_answer_only() -> None:
    presence, frequency = replace(GREEDY, presence_penalty=0.5), replace(GREEDY, frequency_penalty=0.2)
    assert picked([3.0, 2.9, 2.55], presence, token_ids=[0, 0, 0], num_prompt=3) == 0
    assert picked([3.0, 2.55, 2.4], presence, token_ids=[0, 0, 0], num_prompt=1) == 1  # 2.5, however often
    assert picked([3.0, 2.55], frequency, token_ids=[0, 0, 0], num_prompt=1) == 0  # 2.6
    assert picked([3.0, 2.55], frequency, token_ids=[0, 0, 0], num_prompt=0) == 1  # 2.4


def test_logit_bias_is_added_and_100_forces_or_bans() -> None:
    logits = [3.0, 2.9, 0.0, -5.0]
    assert picked(logits, replace(GREEDY, logit_bias=((1, 0.2),))) == 1
    assert picked(logits, replace(GREEDY, logit_bias=((0, -100.0), (1, -100.0)))) == 2
    assert picked(logits, replace(RANDOM, logit_bias=((3, 100.0),))) == 3


def test_stop_tokens_wait_for_min_tokens_whatever_their_bias() -> None:
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(0,), logit_bias=((0, 100.0),))
    assert picked([3.0, 2.0], params, token_ids=[1, 1], num_prompt=1) == 1
    assert picked([3.0, 2.0], params, token_ids=[1, 1, 1], num_prompt=1) == 0
    assert picked([3.0, 2.0], replace(params, ignore_eos=True), token_ids=[1, 1], num_prompt=1) == 0


def test_sampling_leaves_the_logits_alone() -> None:
    logits = logits_of(5, num_rows=len(FILTERS))
    before = logits.clone()
    sample(logits, [row_of(replace(RANDOM, **changes), [1, 2, 2], 1) for changes in FILTERS])
    assert torch.equal(logits, before)


@pytest.mark.promise("D9")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_a_distribution_gives_minus_one_and_the_others_their_tokens(value: float) -> None:
    params = [GREEDY, RANDOM, *(replace(RANDOM, **changes) for changes in FILTERS)]
    logits = logits_of(6, num_rows=2 * len(params))
    single_tokens = [sample(logits[2 * i, None], [row_of(p, [0], 0)])[0] for i, p in enumerate(params)]
    logits[1::2, 200] = value
    tokens = sample(logits, [row_of(p, [0], 0) for p in params for _ in range(2)])
    assert tokens[::2] == single_tokens
    assert set(tokens[1::2]) == {-1}


def test_a_row_whose_tokens_are_all_banned_gives_minus_one() -> None:
    assert picked([-math.inf, -math.inf], GREEDY) == picked([-math.inf, -math.inf], RANDOM) == -1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1e-300},
        {"temperature": 1.1e-5},
        {"temperature": 1.1e-5, "top_k": 3},
        {"temperature": 1e-300},
        {"min_p": 1e-300},
        {"logit_bias": ((1, 100.0),), "temperature": 1.1e-5},
    ],
    ids=str,
)
def test_no_parameter_makes_a_sound_row_look_broken(changes: dict[str, float]) -> None:
    assert picked([0.5, 3.0, -1e30, -math.inf], replace(RANDOM, **changes), token_ids=[1], num_prompt=1) in (0, 1)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1e-7, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.2, 0.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 64, 10_000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.7, 1e-300]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    logit_bias=st.sampled_from([(), (), ((0, 100.0), (5, -100.0))]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.sampled_from([(), (3,), (1, 2)]),
    ignore_eos=st.booleans(),
)
ROWS = st.tuples(PARAMS, st.lists(st.integers(0, 16), max_size=6), st.integers(0, 6), st.integers(0, 9))


@pytest.mark.promise("A7")
@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=9), st.sampled_from([17, 257, 1024]), st.booleans(), st.randoms())
def test_a_row_gives_the_same_tokens_alone_and_at_any_place_in_any_batch(
    drawn: list[tuple[SamplingParams, list[int], int, int]], vocab_size: int, one_is_broken: bool, shuffler: Random
) -> None:
    logits = torch.cat([logits_of(seed, vocab_size) for _, _, _, seed in drawn])
    if one_is_broken:
        logits[0, vocab_size // 2] = math.nan

    def new_rows() -> list[SamplingRow]:
        return [SamplingRow(p, ids, min(prompt, len(ids)), random_stream(p)) for p, ids, prompt, _ in drawn]

    single_rows, batch_rows = new_rows(), new_rows()
    for num_rows in (len(drawn), max(1, len(drawn) - 2), len(drawn)):  # three steps; the batch changes between them
        order = list(range(len(drawn)))
        shuffler.shuffle(order)
        order = order[:num_rows]
        together = sample(logits[order], [batch_rows[i] for i in order])
        assert together == [sample(logits[i, None], [single_rows[i]])[0] for i in order]


@pytest.mark.promise("A7")
def test_holds_at_the_width_of_a_real_vocabulary() -> None:
    params = [replace(RANDOM, **changes) for changes in FILTERS] + [GREEDY, replace(GREEDY, presence_penalty=1.0)]
    logits = logits_of(8, 49_152, len(params))
    for _ in range(3):
        together = sample(logits, [row_of(p, [1, 2, 2], 1) for p in params])
        assert together == [sample(logits[i, None], [row_of(p, [1, 2, 2], 1)])[0] for i, p in enumerate(params)]
        assert sample(logits[5:], [row_of(p, [1, 2, 2], 1) for p in params[5:]]) == together[5:]
        params = [replace(p, seed=(p.seed or 0) + 1) for p in params]


@pytest.mark.parametrize("vocab_size", [5, VOCAB_SIZE])
def test_logprobs_are_the_log_softmax_of_the_raw_logits_likeliest_first(vocab_size: int) -> None:
    logits = logits_of(9, vocab_size, 4)
    expected = logits.log_softmax(-1)
    token_ids, nums_top = [0, 4, 2, 3], [0, 1, 3, MAX_LOGPROBS]
    entries = token_logprobs(logits, token_ids, nums_top)
    for i, (token_id, num_top) in enumerate(zip(token_ids, nums_top, strict=True)):
        assert entries[i].token_id == token_id
        assert entries[i].logprob == float(expected[i, token_id])
        likeliest = expected[i].sort(descending=True, stable=True)
        assert [logprob for _, logprob in entries[i].top] == likeliest.values[:num_top].tolist()
        assert all(logprob == float(expected[i, top_id]) for top_id, logprob in entries[i].top)
        if num_top:
            assert entries[i].top[0][0] == int(logits[i].argmax())


def test_logprobs_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    logits = logits_of(10, 49_152, 9)
    token_ids, nums_top = list(range(9)), [0, 20, 1, 2, 3, 0, 0, 7, 19]
    together = token_logprobs(logits, token_ids, nums_top)
    for i in range(9):
        assert token_logprobs(logits[i, None], [token_ids[i]], [nums_top[i]]) == [together[i]]


def test_without_top_the_logprob_is_the_same_number() -> None:
    logits = logits_of(11, 1000, 3)
    plain, with_top = token_logprobs(logits, [1, 2, 3], [0, 0, 0]), token_logprobs(logits, [1, 2, 3], [0, 0, 5])
    assert [one.logprob for one in plain] == [one.logprob for one in with_top]
    assert all(one.top == () for one in plain)
