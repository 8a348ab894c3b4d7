"""Limits of keys (C2): never more than the limit in any minute, and a Retry-After that is true."""

import copy
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.accounting.limits import LEASE_S, WINDOW_S, Admission, Limiter
from deployments.auth.caller import KeyLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(clock)


_ids = iter(range(10**9))


def admit(limiter: Limiter, limits: KeyLimits, num_tokens: int = 1, request_id: str | None = None) -> Admission:
    return limiter.admit("k1", request_id or str(next(_ids)), limits, num_tokens)


steps = st.lists(
    st.tuples(
        st.floats(0, 30),  # seconds since the last request
        st.integers(1, 60),  # tokens that it may use
        st.floats(0, 1),  # the part of them that it does use
        st.floats(0, 70),  # seconds until those are released
    ),
    max_size=60,
)


@pytest.mark.promise("C2")
@given(steps, st.integers(1, 8), st.integers(60, 200))
def test_no_minute_has_more_than_the_limit_and_retry_after_is_true(
    steps: list[tuple[float, int, float, float]], rpm: int, tpm: int
) -> None:
    limits = KeyLimits(rpm=rpm, tpm=tpm)
    clock = Clock()
    limiter = Limiter(clock)
    admitted: list[list[float]] = []  # time, tokens that count now, tokens used, time of release
    for i, (pause, num_tokens, part, settled_after) in enumerate(steps):
        clock.now += pause
        for j, (_, _, used, settled_at) in enumerate(admitted):
            if settled_at <= clock.now:
                admitted[j][1] = used
                limiter.release("k1", str(j), int(used))
        admission = limiter.admit("k1", str(len(admitted)), limits, num_tokens)
        if admission.refusal is None:
            admitted.append([clock.now, num_tokens, int(num_tokens * part), clock.now + settled_after])
        last_minute = [entry for entry in admitted if entry[0] > clock.now - WINDOW_S]
        assert len(last_minute) <= rpm
        assert sum(entry[1] for entry in last_minute) <= tpm
        if admission.refusal is not None:
            assert len(last_minute) == rpm or sum(entry[1] for entry in last_minute) + num_tokens > tpm
            seconds = int(admission.headers["retry-after"])
            assert 1 <= seconds <= WINDOW_S + 1
            later = copy.deepcopy(limiter)
            later._clock.now += seconds  # type: ignore[attr-defined]
            assert later.admit("k1", "later", limits, num_tokens).refusal is None, i
            if seconds > 2:  # and no longer than needed
                sooner = copy.deepcopy(limiter)
                sooner._clock.now += seconds - 2  # type: ignore[attr-defined]
                assert sooner.admit("k1", "sooner", limits, num_tokens).refusal is not None


@pytest.mark.promise("C2")
def test_a_request_a_minute_after_the_first_passes(clock: Clock, limiter: Limiter) -> None:
    limits = KeyLimits(rpm=2)
    assert admit(limiter, limits).refusal is None
    clock.now += 20
    assert admit(limiter, limits).refusal is None
    admission = admit(limiter, limits)
    assert admission.refusal == "this key's request limit is used up (2 per minute): try again in 41 s"
    assert admission.headers["retry-after"] == "41"
    clock.now += 40
    assert admit(limiter, limits).refusal is None  # the first has left, not both
    assert admit(limiter, limits).refusal is not None


@pytest.mark.promise("C2")
def test_tokens_are_reserved_and_given_back(limiter: Limiter) -> None:
    limits = KeyLimits(tpm=100)
    assert admit(limiter, limits, 80, "a").refusal is None
    admission = admit(limiter, limits, 30)
    assert admission.refusal is not None
    assert "80 are used or reserved, and this request may use 30" in admission.refusal
    limiter.release("k1", "a", 70)
    assert admit(limiter, limits, 30, "b").refusal is None
    assert admit(limiter, limits, 1).refusal is not None


@pytest.mark.promise("C2")
def test_what_can_never_fit_says_so_and_is_not_to_be_sent_again(limiter: Limiter) -> None:
    admission = admit(limiter, KeyLimits(tpm=100), 101)
    assert admission.refusal is not None
    assert "101 tokens" in admission.refusal
    assert "lower max_tokens" in admission.refusal
    assert "retry-after" not in admission.headers
    assert admission.headers["x-should-retry"] == "false"
    assert admit(limiter, KeyLimits(tpm=100), 100).refusal is None  # the other took nothing


@pytest.mark.promise("C2")
def test_requests_at_a_time(limiter: Limiter) -> None:
    limits = KeyLimits(streams=2)
    assert admit(limiter, limits, request_id="a").refusal is None
    assert admit(limiter, limits, request_id="b").refusal is None
    admission = admit(limiter, limits)
    assert admission.headers == {"retry-after": "1"}
    limiter.release("k1", "a", 5)
    assert admit(limiter, limits).refusal is None
    assert admit(limiter, limits).refusal is not None


@pytest.mark.promise("C2")
def test_what_a_dead_replica_left_running_ends_by_itself(clock: Clock, limiter: Limiter) -> None:
    limits = KeyLimits(streams=2)
    admit(limiter, limits, request_id="dead")
    admit(limiter, limits, request_id="alive")
    for _ in range(int(LEASE_S)):
        assert admit(limiter, limits).refusal is not None
        clock.now += 1
        limiter.renew({"k1": ["alive"]})
    assert admit(limiter, limits).refusal is None
    assert admit(limiter, limits).refusal is not None  # the other still runs


@pytest.mark.promise("C2")
def test_a_new_limiter_learns_what_runs(limiter: Limiter) -> None:
    limiter.renew({"k1": ["a", "b"]})
    assert admit(limiter, KeyLimits(streams=2)).refusal is not None
    limiter.release("k1", "a", 3)
    assert admit(limiter, KeyLimits(streams=2)).refusal is None


@pytest.mark.promise("C2")
def test_keys_do_not_share_limits(limiter: Limiter) -> None:
    limits = KeyLimits(rpm=1)
    assert limiter.admit("k1", "a", limits, 1).refusal is None
    assert limiter.admit("k2", "b", limits, 1).refusal is None
    assert limiter.admit("k1", "c", limits, 1).refusal is not None


@pytest.mark.promise("C2")
def test_the_headers_are_openais(clock: Clock, limiter: Limiter) -> None:
    limits = KeyLimits(rpm=10, tpm=500)
    admit(limiter, limits, 100)
    clock.now += 15
    assert admit(limiter, limits, 50).headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "60.000s",
        "x-ratelimit-limit-tokens": "500",
        "x-ratelimit-remaining-tokens": "350",
        "x-ratelimit-reset-tokens": "60.000s",
    }
    assert set(admit(limiter, KeyLimits(rpm=10)).headers) == {
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    }


def test_a_busy_key_takes_little_memory_and_time(clock: Clock, limiter: Limiter) -> None:
    limits = KeyLimits(rpm=600)

    def refusals() -> Iterator[bool]:
        for _ in range(5000):
            clock.now += 0.05
            yield admit(limiter, limits).refusal is not None

    assert sum(refusals()) > 1000
    assert len(limiter._keys["k1"].window) <= 600
