"""Numbers from requests: percentiles, and what a level sums and counts."""

import random
import statistics

import pytest

from clients.bench.results import Load, Request, numbers, percentile, summarize


def test_percentiles_are_interpolated_linearly() -> None:
    assert percentile([5.0], 99) == 5.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([10.0, 20.0], 90) == pytest.approx(19.0)
    draw = random.Random(3)
    values = [draw.random() for _ in range(37)]
    by_hundredths = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 90, 99):
        assert percentile(values, percent) == pytest.approx(by_hundredths[percent - 1])


def test_a_level_sums_what_succeeded_and_counts_what_failed() -> None:
    level = summarize(
        Load(2, None),
        [
            Request("a", 1, 0.0, 2.0, 0.5, 0.1, (0.1, 0.1), 15, 10, 4),
            Request("b", 1, 0.0, 1.0, error="503: overloaded"),
            Request("a", 1, 2.0, 2.0, 1.5, 0.3, (0.3,), 25, 20, 16),
        ],
        client_cpu=0.1,
    )
    assert (level.elapsed_s, level.requests, level.errors, level.first_error) == (4.0, 3, 1, "503: overloaded")
    assert (level.output_tokens, level.output_tokens_per_s, level.requests_per_s) == (40, 10.0, 0.5)
    assert (level.prompt_tokens, level.cached_tokens) == (15.0, 10.0)
    assert level.ttft_s is not None
    assert (level.ttft_s.p50, level.ttft_s.p90) == (1.0, pytest.approx(1.4))
    assert level.tpot_s is not None
    assert level.tpot_s.p50 == pytest.approx(0.2)
    assert level.gap_s is not None
    assert level.gap_s.p50 == pytest.approx(0.1)


def test_numbers_keep_their_order_and_lose_their_doubles() -> None:
    assert numbers("--concurrency", "8,1, 8,32", int) == (8, 1, 32)
    assert numbers("--rate", "", float) == ()
