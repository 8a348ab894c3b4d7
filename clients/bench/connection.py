"""One HTTP/1.1 connection of `clients.bench.stream`, as an asyncio protocol.

A load generator shares its cores with the server that it measures, and httpx costs about five times this CPU time per
piece of a body. Knows neither URLs nor events: bytes go in, and the pieces of a body come out with the time they came.
"""

import asyncio
import time
from collections.abc import Callable

TakeBody = Callable[[int, bytes, float], None]


class Connection(asyncio.Protocol):
    """One request at a time.

    Attributes:
        status: HTTP status of the latest answer, None before its head has come.
        reusable: whether another request may be sent, once no exchange runs.
        idle_since: reading of `time.perf_counter` when the latest answer ended.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.reusable = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[float] | None = None
        self._take_body: TakeBody = lambda status, body, now: None
        self._held = b""  # of a head or a chunk that is not yet whole
        self._chunked = False
        self._left: int | None = None  # bytes of a body of known length
        self._keep_alive = False

    async def exchange(self, request: bytes, take_body: TakeBody) -> float:
        """Send a request, and give what comes of its body to `take_body`, with the status and the time.

        Returns: when the body ended.
        Raises: OSError if the connection breaks, ValueError if the answer is not HTTP/1.1.
        """
        assert self._transport is not None
        self.status, self.reusable, self._held, self._take_body = None, False, b"", take_body
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._ended

    def close(self) -> None:
        """Break off whatever runs."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._ended is None or self._ended.done():
            self.close()  # nobody asked
            return
        try:
            body = self._after_head(data) if self.status is None else data
            if body is not None and (self._take_chunks(body, now) if self._chunked else self._take_plain(body, now)):
                self._end(now)
        except (ValueError, IndexError) as error:
            self._ended.set_exception(ValueError(f"no HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._ended is None or self._ended.done():
            return
        if self.status is not None and not self._chunked and self._left is None:  # a body that lasts until the close
            self._end(time.perf_counter())
        else:
            self._ended.set_exception(error or ConnectionError("the server closed the connection"))

    def _end(self, now: float) -> None:
        assert self._ended is not None
        self.idle_since, self.reusable = now, self._keep_alive
        self._ended.set_result(now)

    def _after_head(self, data: bytes) -> bytes | None:
        """The beginning of the body; None if the head is not yet whole."""
        head, end, body = (self._held + data).partition(b"\r\n\r\n")
        if not end:
            self._held = head
            return None
        status, *lines = head.decode("latin-1").lower().split("\r\n")
        headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(status.split(" ")[1])
        self._chunked = "chunked" in headers.get("transfer-encoding", "")
        self._left = int(headers["content-length"]) if "content-length" in headers and not self._chunked else None
        framed = self._chunked or self._left is not None
        self._keep_alive = framed and status.startswith("http/1.1") and headers.get("connection") != "close"
        self._held = b""
        return body

    def _take_plain(self, body: bytes, now: float) -> bool:
        assert self.status is not None
        self._take_body(self.status, body, now)
        if self._left is None:
            return False
        self._left -= len(body)
        return self._left <= 0

    def _take_chunks(self, data: bytes, now: float) -> bool:
        assert self.status is not None
        held = self._held + data
        while (line := held.find(b"\r\n")) >= 0:
            size = int(held[:line].split(b";")[0], 16)
            if size == 0:
                self._held = held
                return held.endswith(b"\r\n\r\n")
            start, end = line + 2, line + 2 + size
            if len(held) < end + 2:
                break
            self._take_body(self.status, held[start:end], now)
            held = held[end + 2 :]
        self._held = held
        return False
