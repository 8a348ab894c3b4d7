"""The ledger as a replica of the API sees it: admit before a request of a limited key, settle after it, report all.

A request of a key without limits waits for nothing here. Reports go once a second at most, and again until the ledger
has them; `booking.py` says what is reported.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast

from deployments.accounting.limits import Admission
from deployments.accounting.request_record import CLIENT_LEFT, RequestRecord, RequestTrace
from deployments.auth.caller import NO_LIMITS, Caller
from deployments.errors import NotReady, RateLimited, error_response

_ADMIT_S = 2.0  # a request waits no longer for a ledger that is away
_SETTLE_S = 1.0  # nor the end of an answer
_REPORT_S = 10.0
_REPORT_PERIOD_S = 1.0
_MAX_UNREPORTED = 100_000  # records kept while the ledger is away
_MAX_REPORT = 5_000  # records in one report

logger = logging.getLogger("ray.serve")


class LedgerClient:
    """One for each replica of the API.

    Args:
        ledger: Ray Serve's handle of `Ledger`.
    """

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self._reporter = uuid.uuid4().hex
        self._num_reports = 0
        self._unreported: deque[RequestRecord] = deque(maxlen=_MAX_UNREPORTED)
        self._report: list[RequestRecord] = []  # sent, and not known to have arrived
        self._sending = asyncio.Lock()
        self._running: dict[str, set[str]] = {}  # key -> its admitted requests
        self._reporting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop keeps none alive

    @contextmanager
    def recorded(self, trace: RequestTrace) -> Iterator[RequestTrace]:
        """Count the request when the block ends, however it ends."""
        try:
            yield trace
        except (asyncio.CancelledError, GeneratorExit):
            trace.status = trace.status or CLIENT_LEFT
            raise
        except Exception as error:
            trace.status = trace.status or error_response(error)[0]
            raise
        finally:
            self._unreported.append(trace.record())
            self._report_soon()

    @asynccontextmanager
    async def admitted(self, caller: Caller, num_tokens: int, trace: RequestTrace) -> AsyncIterator[None]:
        """Hold a place within the caller's limits for as long as the block lasts; what `trace` used then is settled.

        Args:
            num_tokens: the most that the request can use.

        Raises:
            RateLimited: there is no room.
            NotReady: nobody can tell, because the ledger is away.
        """
        if caller.key_id is None or caller.limits == NO_LIMITS:
            yield
            return
        request_id = uuid.uuid4().hex
        verdict = await self._admit(caller, caller.key_id, request_id, num_tokens)
        trace.headers = verdict.headers
        if verdict.refusal is not None:
            raise RateLimited(verdict.refusal, verdict.headers)
        self._running.setdefault(caller.key_id, set()).add(request_id)
        self._report_soon()
        try:
            yield
        finally:
            self._forget(caller.key_id, request_id)
            settling = self._spawn(self._release(caller.key_id, request_id, trace.used.total_tokens))
            # Before the last byte of the answer, so that the caller's next request finds its place free. A caller who
            # has left cancels this wait, not the settling.
            await asyncio.wait({settling}, timeout=_SETTLE_S)

    async def metrics(self) -> str:
        """What the ledger has for `GET /metrics`.

        Raises:
            NotReady: it is away.
        """
        try:
            return cast(str, await asyncio.wait_for(self._ledger.metrics.remote(), _ADMIT_S))
        except Exception as error:
            logger.warning("the ledger has no metrics: %r", error)
            raise NotReady("the ledger, which counts requests, is away for a moment: try again") from error

    async def flush(self) -> None:
        """Report what is left, before this replica ends."""
        with suppress(Exception):  # it may have ended before
            await self._send_report()

    async def _admit(self, caller: Caller, key_id: str, request_id: str, num_tokens: int) -> Admission:
        try:
            asked = self._ledger.admit.remote(key_id, request_id, caller.limits, num_tokens)
            return cast(Admission, await asyncio.wait_for(asked, _ADMIT_S))
        except BaseException as error:
            self._spawn(self._release(key_id, request_id, 0))  # in case it was admitted and nobody heard of it
            if not isinstance(error, Exception):
                raise
            logger.warning("the ledger does not answer: %r", error)
            raise NotReady("the limits of this key cannot be checked for a moment: try again") from error

    async def _release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        with suppress(Exception):  # a ledger that died has forgotten the request, one that is cut off forgets its lease
            await asyncio.wait_for(self._ledger.release.remote(key_id, request_id, num_tokens), _REPORT_S)

    def _forget(self, key_id: str, request_id: str) -> None:
        running = self._running[key_id]
        running.discard(request_id)
        if not running:
            del self._running[key_id]

    def _report_soon(self) -> None:
        if self._reporting is None or self._reporting.done():
            self._reporting = self._spawn(self._report_while_needed())

    async def _report_while_needed(self) -> None:
        """At once, and then every second until all is told and nothing runs."""
        while self._unreported or self._report or self._running:
            try:
                await self._send_report()
            except Exception as error:
                logger.warning("the ledger took no report, which is sent again: %r", error)
            await asyncio.sleep(_REPORT_PERIOD_S)

    async def _send_report(self) -> None:
        """A report that is sent again has the same number and records: the ledger counts it once."""
        async with self._sending:
            if not self._report and self._unreported:
                self._num_reports += 1
                self._report = [self._unreported.popleft() for _ in range(min(_MAX_REPORT, len(self._unreported)))]
            running = {key_id: list(request_ids) for key_id, request_ids in self._running.items()}
            told = self._ledger.report.remote(self._reporter, self._num_reports, self._report, running)
            await asyncio.wait_for(told, _REPORT_S)
            self._report = []

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
