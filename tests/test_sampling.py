"""How one request picks its next token, whatever its neighbours ask for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.request import SamplingParams
from deployments.engine.sampling import SamplingRow, random_stream, sample, token_logprobs

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 2.0])


def draws(
    params: SamplingParams, prompt: list[int] | None = None, answer: list[int] | None = None, n: int = 300
) -> list[int]:
    token_ids = (prompt or []) + (answer or [])
    row = SamplingRow(params, token_ids, len(prompt or []), random_stream(params))
    return [sample(LOGITS[None], [row])[0] for _ in range(n)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(SamplingParams(max_tokens=1, temperature=0))) == {1}


def test_top_k_keeps_that_many() -> None:
    assert set(draws(SamplingParams(max_tokens=1, temperature=2.0, top_k=2, seed=0))) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] < 0.5 < probabilities[1] + probabilities[2]
    assert set(draws(SamplingParams(max_tokens=1, top_p=0.5, seed=0))) == {1, 2}
    assert set(draws(SamplingParams(max_tokens=1, top_p=0.01, seed=0))) == {1}


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    assert set(draws(SamplingParams(max_tokens=1, min_p=0.3, seed=0))) == {1, 2, 4}  # e^-1 > 0.3 > e^-3


def test_a_seed_fixes_the_draws_and_other_seeds_differ() -> None:
    assert draws(SamplingParams(max_tokens=1, seed=-1)) == draws(SamplingParams(max_tokens=1, seed=-1))
    assert draws(SamplingParams(max_tokens=1, seed=1)) != draws(SamplingParams(max_tokens=1, seed=2))


def test_draws_follow_the_probabilities() -> None:
    drawn = draws(SamplingParams(max_tokens=1, seed=0), n=4000)
    for token, probability in enumerate(LOGITS.softmax(-1).tolist()):
        assert abs(drawn.count(token) / 4000 - probability) < 0.03


def test_repetition_penalty_counts_each_seen_token_once_and_leaves_the_logits_alone() -> None:
    before = LOGITS.clone()
    params = SamplingParams(max_tokens=1, temperature=0, repetition_penalty=1.2)
    assert set(draws(params, prompt=[1, 1], answer=[1], n=3)) == {2}  # 3.0 / 1.2 = 2.5 < 2.9
    assert torch.equal(LOGITS, before)


def test_presence_and_frequency_penalties_look_at_the_answer_only() -> None:
    presence = SamplingParams(max_tokens=1, temperature=0, presence_penalty=0.2)
    assert set(draws(presence, prompt=[1], n=1)) == {1}
    assert set(draws(presence, answer=[1], n=1)) == {2}
    frequency = SamplingParams(max_tokens=1, temperature=0, frequency_penalty=0.06)
    assert set(draws(frequency, answer=[1], n=1)) == {1}
    assert set(draws(frequency, answer=[1, 1], n=1)) == {2}


def test_logit_bias_is_added() -> None:
    assert set(draws(SamplingParams(max_tokens=1, temperature=0, logit_bias=((3, 100.0),)), n=1)) == {3}
    assert set(draws(SamplingParams(max_tokens=1, temperature=0, logit_bias=((1, -100.0),)), n=1)) == {2}


def test_a_stop_token_cannot_come_before_min_tokens() -> None:
    params = SamplingParams(max_tokens=3, min_tokens=2, temperature=0, stop_token_ids=(1,))
    assert set(draws(params, answer=[4], n=1)) == {2}
    assert set(draws(params, answer=[4, 4], n=1)) == {1}


def test_d9_nan_is_reported_for_its_own_row_only() -> None:
    row = SamplingRow(SamplingParams(max_tokens=1, temperature=0), [], 0, None)
    assert sample(torch.stack([LOGITS, torch.full((5,), torch.nan), LOGITS]), [row] * 3) == [1, -1, 1]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    expected = logits.log_softmax(-1)
    first, second = token_logprobs(logits, [0, 1], [2, 0])
    assert abs(first.logprob - float(expected[0, 0])) < 1e-5
    assert [token for token, _ in first.top] == [1, 2]
    assert abs(first.top[1][1] - float(expected[0, 2])) < 1e-5
    assert (second.token_id, second.top) == (1, ())


_PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(8),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    top_k=st.sampled_from([0, 5, 1000]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((7, 3.0),)]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_PARAMS, min_size=1, max_size=6), st.integers(0, 100))
def test_a7_a_row_is_sampled_alike_alone_and_in_any_batch(params: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(params), 3000, generator=torch.Generator().manual_seed(seed)) * 3

    def rows() -> list[SamplingRow]:
        return [SamplingRow(p, [5, 7, 7], 1, random_stream(p)) for p in params]

    together = sample(logits, rows())
    assert [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows())] == together
