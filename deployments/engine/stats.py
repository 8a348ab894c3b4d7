"""How an engine is doing: what its owner shows on a dashboard. Plain data, importable without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """State of one engine now, and what it has counted since it started.

    Attributes:
        num_running: sequences that hold KV blocks.
        num_waiting: sequences that wait for blocks or for their turn.
        kv_cache_usage: the part of the KV blocks that sequences hold, 0 to 1.
        num_loaded_adapters: adapters that can be used without loading.
        prefix_cache_queries: tokens of prompts that were looked up in the prefix cache.
        prefix_cache_hits: those of them that were there.
        num_preemptions: sequences that gave their blocks back to be computed again.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_loaded_adapters: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
