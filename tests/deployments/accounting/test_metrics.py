"""What `GET /metrics` prints (A4): read back by Prometheus' own parser."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.accounting.metrics import RequestMetrics, engine_metrics
from deployments.accounting.request_record import RequestRecord, RequestTrace
from deployments.auth.caller import ANONYMOUS
from deployments.engine.stats import EngineStats
from deployments.protocol.base import Usage

Series = dict[tuple[str, tuple[str, ...]], float]
RECORD = RequestRecord(
    "/v1/chat/completions",
    200,
    0.0,
    model="tiny:a@2",
    key_id="k1",
    key_name="alice",
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=5,
    first_token_s=0.03,
    token_s=0.02,
    duration_s=0.11,
)


def series(text: str) -> Series:
    """(name, label values in the order of the label names) -> value; every metric has its help."""
    samples: Series = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            samples[sample.name, tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return samples


@pytest.mark.promise("A4")
def test_requests_tokens_and_latencies_by_model_version() -> None:
    metrics = RequestMetrics()
    for record in (RECORD, RECORD, replace(RECORD, model="tiny:a@3", first_token_s=9.0)):
        metrics.add(record)
    samples = series(metrics.text())
    route = "/v1/chat/completions"
    assert samples["corral_requests_total", ("tiny:a@2", route, "200")] == 2
    assert samples["corral_requests_total", ("tiny:a@3", route, "200")] == 1
    assert samples["corral_prompt_tokens_total", ("tiny:a@2",)] == 20
    assert samples["corral_prompt_tokens_cached_total", ("tiny:a@2",)] == 8
    assert samples["corral_generation_tokens_total", ("tiny:a@2",)] == 10
    assert samples["corral_time_to_first_token_seconds_bucket", ("0.02", "tiny:a@2")] == 0
    assert samples["corral_time_to_first_token_seconds_bucket", ("0.04", "tiny:a@2")] == 2
    assert samples["corral_time_to_first_token_seconds_sum", ("tiny:a@3",)] == 9
    assert samples["corral_time_per_output_token_seconds_bucket", ("0.025", "tiny:a@2")] == 2
    assert samples["corral_e2e_request_latency_seconds_count", ("tiny:a@2",)] == 2
    assert samples["corral_key_requests_total", ("alice",)] == 3
    assert samples["corral_key_prompt_tokens_total", ("alice",)] == 30
    assert samples["corral_key_generation_tokens_total", ("alice",)] == 15
    assert not [name for name, _ in samples if name.endswith("_created")]


@pytest.mark.promise("A4")
def test_what_was_refused_is_counted_by_status() -> None:
    metrics = RequestMetrics()
    for status in (400, 401, 404, 429, 503):
        metrics.add(RequestRecord("/v1/completions", status, 0.0))
    samples = series(metrics.text())
    for status in (400, 401, 404, 429, 503):
        assert samples["corral_requests_total", ("", "/v1/completions", str(status))] == 1
    assert not [name for name, _ in samples if name.startswith("corral_prompt_tokens")]


@pytest.mark.promise("A4")
def test_labels_are_bounded() -> None:
    metrics = RequestMetrics()
    for i in range(1000):
        metrics.add(replace(RECORD, model=f"tiny:a@{i}", key_name=f"key {i}"))
    samples = series(metrics.text())
    assert len([name for name, _ in samples if name == "corral_requests_total"]) == 501
    assert samples["corral_prompt_tokens_total", ("other",)] == 5000
    assert len([name for name, _ in samples if name == "corral_key_requests_total"]) == 201
    assert samples["corral_key_requests_total", ("other",)] == 800


@pytest.mark.promise("A4")
def test_engines_are_shown_by_replica() -> None:
    busy = EngineStats(3, 2, 0.25, 4, prefix_cache_queries=100, prefix_cache_hits=60, num_preemptions=7)
    idle = EngineStats(0, 0, 0.0, 0, 0, 0, 0)
    samples = series(engine_metrics({"a": busy, "b": idle}))
    assert samples["corral_replicas", ()] == 2
    assert {name: value for (name, labels), value in samples.items() if labels == ("a",)} == {
        "corral_num_requests_running": 3,
        "corral_num_requests_waiting": 2,
        "corral_kv_cache_usage_perc": 0.25,
        "corral_num_loaded_adapters": 4,
        "corral_prefix_cache_queries_total": 100,
        "corral_prefix_cache_hits_total": 60,
        "corral_num_preemptions_total": 7,
    }
    assert samples["corral_num_requests_running", ("b",)] == 0
    assert series(engine_metrics({})) == {("corral_replicas", ()): 0}


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


def test_a_trace_has_the_seconds_from_the_request_to_first_token_and_between_tokens() -> None:
    trace = RequestTrace("/v1/completions", ANONYMOUS, "tiny", 200, num_completions=2, started_at=100.0)
    trace.usage = usage(7, 22)  # two answers of 11 tokens
    trace.first_token_at, trace.last_token_at = 101.0, 103.0
    record = trace.record()
    assert (record.first_token_s, record.token_s, record.duration_s) == (1.0, 0.2, 3.0)
    assert (record.prompt_tokens, record.completion_tokens) == (7, 22)
    assert (record.key_id, record.key_name) == (None, "anonymous")


def test_a_trace_of_one_token_has_no_time_between_tokens_and_a_scored_text_no_first_token() -> None:
    trace = RequestTrace(status=200, started_at=100.0, first_token_at=101.0, last_token_at=101.0, usage=usage(7, 1))
    assert (trace.record().first_token_s, trace.record().token_s) == (1.0, None)
    trace.usage = usage(7, 0)
    assert (trace.record().first_token_s, trace.record().duration_s) == (None, 1.0)


def test_what_failed_before_its_first_token_used_nothing_and_what_broke_off_used_what_it_gave() -> None:
    trace = RequestTrace(status=500, usage=usage(7, 0))
    assert trace.record().prompt_tokens == 0
    trace.mark_token()
    assert trace.record().prompt_tokens == 7
    cancelled = RequestTrace(status=499, usage=usage(7, 0))
    assert (cancelled.record().prompt_tokens, cancelled.record().failed) == (7, False)
