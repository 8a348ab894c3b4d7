"""Ledger: enforces the limits of API keys and counts usage, over all replicas of the API.

A single replica beside ChatIngress and LlamaModel. Keeps limits in memory and usage on disk. Knows nothing of HTTP.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from ray import serve

from deployments.accounting.limits import Admission, Limiter
from deployments.accounting.metrics import RequestMetrics
from deployments.accounting.request_record import RequestRecord
from deployments.accounting.usage import UsageStore, usage_path
from deployments.auth.caller import KeyLimits
from deployments.head_replica import HEAD_REPLICA


@serve.deployment(**HEAD_REPLICA)  # on the head node, where `corral usage` reads the file
class Ledger:
    """Limits, usage and request metrics. After a crash, usage is intact and the window of every limit is empty."""

    def __init__(self) -> None:
        self._limiter = Limiter()
        self._metrics = RequestMetrics()
        self._usage = UsageStore(usage_path())
        self._count_lock = asyncio.Lock()

    async def admit(
        self, key_id: str, request_id: str, limits: KeyLimits, num_tokens: int, min_tokens: int
    ) -> Admission:
        """Decide whether a request that uses at most `num_tokens` may run now, if need be with fewer."""
        return self._limiter.admit(key_id, request_id, limits, num_tokens, min_tokens)

    async def release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        """End an admitted request that used `num_tokens`."""
        self._limiter.release(key_id, request_id, num_tokens)

    async def report(
        self, reporter: str, number: int, records: Sequence[RequestRecord], running: Mapping[str, Collection[str]]
    ) -> None:
        """Count what a replica of the API has served since its last report; returns once it is on disk.

        Args:
            reporter: id of the API replica.
            number: of this replica's reports, growing; a report that is sent twice is counted once.
            running: admitted requests that have not ended, by key id.
        """
        self._limiter.renew(running)
        if not records:
            return
        async with self._count_lock:
            await asyncio.to_thread(self._count, reporter, number, records)

    async def metrics(self) -> str:
        """Request metrics in Prometheus' text format."""
        return await asyncio.to_thread(self._metrics.text)

    def _count(self, reporter: str, number: int, records: Sequence[RequestRecord]) -> None:
        if self._usage.add(reporter, number, records):
            for record in records:
                self._metrics.add(record)
