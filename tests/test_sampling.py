"""How one request picks its next token."""

import torch

from deployments.engine.request import SamplingParams
from deployments.engine.sampling import random_stream, sample

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 2.0])


def draws(params: SamplingParams, seen: list[int] | None = None, n: int = 300) -> list[int]:
    stream = random_stream(params)
    return [sample(LOGITS, params, seen or [], stream) for _ in range(n)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(SamplingParams(max_tokens=1, temperature=0))) == {1}


def test_top_k_keeps_that_many() -> None:
    assert set(draws(SamplingParams(max_tokens=1, temperature=2.0, top_k=2, seed=0))) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] < 0.5 < probabilities[1] + probabilities[2]
    assert set(draws(SamplingParams(max_tokens=1, top_p=0.5, seed=0))) == {1, 2}
    assert set(draws(SamplingParams(max_tokens=1, top_p=0.01, seed=0))) == {1}


def test_a_seed_fixes_the_draws_and_other_seeds_differ() -> None:
    assert draws(SamplingParams(max_tokens=1, seed=1)) == draws(SamplingParams(max_tokens=1, seed=1))
    assert draws(SamplingParams(max_tokens=1, seed=1)) != draws(SamplingParams(max_tokens=1, seed=2))


def test_draws_follow_the_probabilities() -> None:
    drawn = draws(SamplingParams(max_tokens=1, seed=0), n=4000)
    for token, probability in enumerate(LOGITS.softmax(-1).tolist()):
        assert abs(drawn.count(token) / 4000 - probability) < 0.03


def test_repetition_penalty_counts_each_seen_token_once_and_leaves_the_logits_alone() -> None:
    before = LOGITS.clone()
    params = SamplingParams(max_tokens=1, temperature=0, repetition_penalty=1.2)
    assert set(draws(params, seen=[1, 1, 1], n=3)) == {2}  # 3.0 / 1.2 = 2.5 < 2.9
    assert torch.equal(LOGITS, before)
