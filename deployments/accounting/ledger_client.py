"""Client of the ledger in a replica of the API: admits requests of limited keys, and reports every request.

Requests of keys without limits never wait for the ledger. Reports are sent at most once a second, and sent again until
the ledger has acknowledged them.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast

from deployments.accounting.limits import Admission
from deployments.accounting.request_record import CLIENT_CLOSED_REQUEST, RequestRecord, RequestTrace
from deployments.auth.caller import NO_LIMITS, Caller
from deployments.errors import NotReady, RateLimited, error_response

_ADMIT_S = 2.0  # how long a request waits for a ledger that does not respond
_RELEASE_S = 1.0  # how long the end of a response waits for it
_REPORT_S = 10.0
_REPORT_PERIOD_S = 1.0
_MAX_UNREPORTED = 100_000  # records kept while the ledger is unavailable
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
        self._report: list[RequestRecord] = []  # sent and not acknowledged
        self._send_lock = asyncio.Lock()
        self._running: dict[str, set[str]] = {}  # key id -> ids of its admitted requests
        self._report_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop has weak references only

    @contextmanager
    def recorded(self, trace: RequestTrace) -> Iterator[RequestTrace]:
        """Record the request when the block ends, whether or not it raises."""
        try:
            yield trace
        except (asyncio.CancelledError, GeneratorExit):
            trace.status = trace.status or CLIENT_CLOSED_REQUEST
            raise
        except Exception as error:
            trace.status = trace.status or error_response(error)[0]
            raise
        finally:
            self._unreported.append(trace.record())
            self._ensure_reporting()

    @asynccontextmanager
    async def admitted(
        self, caller: Caller, num_tokens: int, min_tokens: int, trace: RequestTrace
    ) -> AsyncIterator[int]:
        """Reserve room within the caller's limits for the duration of the block, then release what `trace` did not use.

        Yields the most tokens that the request may use, prompt and completions together.

        Args:
            num_tokens: the most that the request can use.
            min_tokens: with how few it may be admitted if there are not as many.

        Raises:
            RateLimited: the caller's limits have no room for the request.
            NotReady: the ledger does not respond.
        """
        if caller.key_id is None or caller.limits == NO_LIMITS:
            yield num_tokens
            return
        request_id = uuid.uuid4().hex
        admission = await self._admit(caller, caller.key_id, request_id, num_tokens, min_tokens)
        trace.headers = admission.headers
        if admission.refusal is not None:
            raise RateLimited(admission.refusal, admission.headers)
        self._running.setdefault(caller.key_id, set()).add(request_id)
        self._ensure_reporting()
        try:
            yield admission.num_tokens
        finally:
            self._remove_running(caller.key_id, request_id)
            release = self._spawn(self._release(caller.key_id, request_id, trace.counted_usage.total_tokens))
            # Before the last byte of the response, so that the caller's next request finds room. A client that
            # disconnects cancels this wait, not the release.
            await asyncio.wait({release}, timeout=_RELEASE_S)

    async def metrics(self) -> str:
        """The ledger's part of `GET /metrics`.

        Raises:
            NotReady: the ledger does not respond.
        """
        try:
            return cast(str, await asyncio.wait_for(self._ledger.metrics.remote(), _ADMIT_S))
        except Exception as error:
            logger.warning("no metrics from the ledger: %r", error)
            raise NotReady("request metrics are temporarily unavailable: try again") from error

    async def flush(self) -> None:
        """Report what has not been reported yet, before this replica stops."""
        with suppress(Exception):  # the ledger may have stopped first
            await self._send_report()

    async def _admit(self, caller: Caller, key_id: str, request_id: str, num_tokens: int, min_tokens: int) -> Admission:
        try:
            admission = self._ledger.admit.remote(key_id, request_id, caller.limits, num_tokens, min_tokens)
            return cast(Admission, await asyncio.wait_for(admission, _ADMIT_S))
        except BaseException as error:
            self._spawn(self._release(key_id, request_id, 0))  # it may have been admitted all the same
            if not isinstance(error, Exception):
                raise
            logger.warning("the ledger does not respond: %r", error)
            raise NotReady("the limits of this key cannot be checked at the moment: try again") from error

    async def _release(self, key_id: str, request_id: str, num_tokens: int) -> None:
        # A ledger that restarts does not know the request, and one that cannot be reached lets its lease expire.
        with suppress(Exception):
            await asyncio.wait_for(self._ledger.release.remote(key_id, request_id, num_tokens), _REPORT_S)

    def _remove_running(self, key_id: str, request_id: str) -> None:
        running = self._running[key_id]
        running.discard(request_id)
        if not running:
            del self._running[key_id]

    def _ensure_reporting(self) -> None:
        if self._report_task is None or self._report_task.done():
            self._report_task = self._spawn(self._report_periodically())

    async def _report_periodically(self) -> None:
        """Report now, then every second until everything is reported and no request runs."""
        while self._unreported or self._report or self._running:
            try:
                await self._send_report()
            except Exception as error:
                logger.warning("a report to the ledger failed and will be sent again: %r", error)
            await asyncio.sleep(_REPORT_PERIOD_S)

    async def _send_report(self) -> None:
        """Send the next report, or the last one again with the same number and records: the ledger counts it once."""
        async with self._send_lock:
            if not self._report and self._unreported:
                self._num_reports += 1
                self._report = [self._unreported.popleft() for _ in range(min(_MAX_REPORT, len(self._unreported)))]
            running = {key_id: list(request_ids) for key_id, request_ids in self._running.items()}
            acknowledgement = self._ledger.report.remote(self._reporter, self._num_reports, self._report, running)
            await asyncio.wait_for(acknowledgement, _REPORT_S)
            self._report = []

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
