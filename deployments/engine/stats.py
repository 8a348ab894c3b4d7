"""Statistics of an engine, for metrics and dashboards. Plain data, importable without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The current state of one engine, and its counters since it started.

    Attributes:
        num_running: sequences that hold KV blocks.
        num_waiting: sequences that wait for KV blocks or for their turn.
        kv_cache_usage: fraction of the KV blocks that sequences hold, 0 to 1.
        num_loaded_adapters: adapters in slots, usable without loading.
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: of these, the tokens that were cached.
        num_preemptions: times that a sequence lost its blocks and had to be computed again.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_loaded_adapters: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
