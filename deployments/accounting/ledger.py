"""Ledger: the one place that knows what all replicas of the API have let in, and counts what they served.

One replica, beside ChatIngress and LlamaModel. The ingress reaches it through `ledger_client.py`: before and after a
request of a key with limits, and once a second with what was served. Keeps limits in memory and usage on disk.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from ray import serve

from deployments.accounting.limits import Admission, Limiter
from deployments.accounting.metrics import RequestMetrics
from deployments.accounting.request_record import RequestRecord
from deployments.accounting.usage import UsageStore, usage_path
from deployments.auth.caller import KeyLimits


@serve.deployment(
    num_replicas=1,
    max_surge_percent=100,  # at a redeploy the next one is there before this one goes
    max_ongoing_requests=1000,
    health_check_period_s=1,  # how soon Serve sees that it died
    # on the head node, where `corral usage` reads the file
    ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    graceful_shutdown_timeout_s=10,
)
class Ledger:
    """Limits, usage and request metrics. After a crash the usage is whole, and every key's minute begins anew."""

    def __init__(self) -> None:
        self._limiter = Limiter()
        self._metrics = RequestMetrics()
        self._usage = UsageStore(usage_path())
        self._counting = asyncio.Lock()

    async def admit(self, key_id: str, request_id: str, limits: KeyLimits, num_tokens: int) -> Admission:
        """Whether a request that uses up to `num_tokens` may run now."""
        return self._limiter.admit(key_id, request_id, limits, num_tokens)

    async def release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        """An admitted request has ended, and used so many tokens."""
        self._limiter.release(key_id, request_id, num_tokens)

    async def report(
        self, reporter: str, number: int, records: Sequence[RequestRecord], running: Mapping[str, Collection[str]]
    ) -> None:
        """Count what a replica of the API has served since its last report; returns when it is on disk.

        Args:
            number: of this replica's reports; one that is sent again is counted once.
            running: admitted requests that have not ended, by key.
        """
        self._limiter.renew(running)
        if not records:
            return
        async with self._counting:
            await asyncio.to_thread(self._count, reporter, number, records)

    async def metrics(self) -> str:
        """Request metrics in Prometheus' text format."""
        return await asyncio.to_thread(self._metrics.text)

    def _count(self, reporter: str, number: int, records: Sequence[RequestRecord]) -> None:
        if self._usage.add(reporter, number, records):
            for record in records:
                self._metrics.add(record)
