"""Metrics of `GET /metrics` in Prometheus' text format, named as in vLLM where vLLM has the metric.

RequestMetrics counts requests; `engine_metrics` shows the state that model replicas report. Knows nothing of Ray.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.accounting.request_record import RequestRecord
from deployments.engine.stats import EngineStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_MAX_MODELS = 500  # distinct values of a label; further ones are counted as "other"
_MAX_KEYS = 200

# Seconds. vLLM's buckets, so that dashboards can compare both.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)


class RequestMetrics:
    """Counts requests since its creation. Thread-safe."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each, which Prometheus does not use
        self._registry = registry = CollectorRegistry()
        by_model, by_key = ("model_name",), ("key",)
        self._requests = Counter(
            "corral_requests",
            "Requests by route, model (empty: none or unknown) and status (499: the client disconnected).",
            ("route", "model_name", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter("corral_prompt_tokens", "Prompt tokens.", by_model, registry=registry)
        self._cached_tokens = Counter(
            "corral_prompt_tokens_cached", "Prompt tokens served from the prefix cache.", by_model, registry=registry
        )
        self._generation_tokens = Counter("corral_generation_tokens", "Generated tokens.", by_model, registry=registry)
        self._first_token_s = Histogram(
            "corral_time_to_first_token_seconds",
            "From the request to the first token.",
            by_model,
            registry=registry,
            buckets=_FIRST_TOKEN_S,
        )
        self._token_s = Histogram(
            "corral_time_per_output_token_seconds",
            "Time between output tokens, averaged over a request.",
            by_model,
            registry=registry,
            buckets=_TOKEN_S,
        )
        self._request_s = Histogram(
            "corral_e2e_request_latency_seconds",
            "From the request to the last token.",
            by_model,
            registry=registry,
            buckets=_REQUEST_S,
        )
        self._key_requests = Counter("corral_key_requests", "Requests by key name.", by_key, registry=registry)
        self._key_prompt_tokens = Counter(
            "corral_key_prompt_tokens", "Prompt tokens by key name.", by_key, registry=registry
        )
        self._key_generation_tokens = Counter(
            "corral_key_generation_tokens", "Generated tokens by key name.", by_key, registry=registry
        )
        self._models = _BoundedLabel(_MAX_MODELS)
        self._keys = _BoundedLabel(_MAX_KEYS)

    def add(self, record: RequestRecord) -> None:
        """Count one request."""
        model = self._models.label(record.model) if record.model is not None else ""
        self._requests.labels(record.route, model, str(record.status)).inc()
        if record.key_name is not None:
            key = self._keys.label(record.key_name)
            self._key_requests.labels(key).inc()
            self._key_prompt_tokens.labels(key).inc(record.prompt_tokens)
            self._key_generation_tokens.labels(key).inc(record.completion_tokens)
        if record.model is None:
            return
        self._prompt_tokens.labels(model).inc(record.prompt_tokens)
        self._cached_tokens.labels(model).inc(record.cached_tokens)
        self._generation_tokens.labels(model).inc(record.completion_tokens)
        for histogram, seconds in (
            (self._first_token_s, record.first_token_s),
            (self._token_s, record.token_s),
            (self._request_s, record.duration_s),
        ):
            if seconds is not None:
                histogram.labels(model).observe(seconds)

    def text(self) -> str:
        """Everything counted so far."""
        return generate_latest(self._registry).decode()


class _BoundedLabel:
    """Keeps the first `limit` values of a label, and maps all others to "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: set[str] = set()

    def label(self, value: str) -> str:
        if value not in self._values:
            if len(self._values) >= self._limit:
                return "other"
            self._values.add(value)
        return value


def engine_metrics(engines: Mapping[str, EngineStats]) -> str:
    """The state of the model replicas that responded, by replica id."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engines))
    return generate_latest(registry).decode()


class _EngineCollector(Collector):
    def __init__(self, engines: Mapping[str, EngineStats]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("corral_replicas", "Model replicas that responded.", value=len(self._engines))
        yield self._gauge("num_requests_running", "Running sequences.", lambda stats: stats.num_running)
        yield self._gauge("num_requests_waiting", "Waiting sequences.", lambda stats: stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "KV cache usage, 0 to 1.", lambda stats: stats.kv_cache_usage)
        yield self._gauge("num_loaded_adapters", "Loaded adapters.", lambda stats: stats.num_loaded_adapters)
        yield self._counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            lambda stats: stats.prefix_cache_queries,
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_cache_hits
        )
        yield self._counter(
            "num_preemptions", "Sequences preempted to free KV blocks.", lambda stats: stats.num_preemptions
        )

    def _gauge(self, name: str, help_text: str, value: Callable[[EngineStats], float]) -> Metric:
        gauge = GaugeMetricFamily(f"corral_{name}", help_text, labels=("replica",))
        for replica, stats in self._engines.items():
            gauge.add_metric((replica,), value(stats))
        return gauge

    def _counter(self, name: str, help_text: str, value: Callable[[EngineStats], float]) -> Metric:
        counter = CounterMetricFamily(f"corral_{name}", help_text, labels=("replica",))
        for replica, stats in self._engines.items():
            counter.add_metric((replica,), value(stats))
        return counter
