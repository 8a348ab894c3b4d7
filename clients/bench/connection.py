"""An HTTP/1.1 client connection as an asyncio protocol, with little CPU time per chunk of a response.

A load generator shares its cores with the server that it measures, and httpx costs about five times this CPU time per
chunk. Knows neither URLs nor events: bytes go in, and the chunks of a body come out with their arrival times.
"""

import asyncio
import time
from collections.abc import Callable

OnBody = Callable[[int, bytes, float], None]


class Connection(asyncio.Protocol):
    """A connection for one request at a time.

    Attributes:
        status: HTTP status of the latest response, None before its head has arrived.
        reusable: whether another request may be sent after the current exchange.
        idle_since: reading of `time.perf_counter` when the latest response ended.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.reusable = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._completion: asyncio.Future[float] | None = None
        self._on_body: OnBody = lambda status, body, now: None
        self._buffer = b""  # of an incomplete head or chunk
        self._chunked = False
        self._remaining: int | None = None  # bytes of a body of known length
        self._keep_alive = False

    async def exchange(self, request: bytes, on_body: OnBody) -> float:
        """Send a request; call `on_body` with the status, the chunk and its arrival time for each chunk of the body.

        Returns: the time at which the body ended.
        Raises: OSError if the connection is lost, ValueError if the response is not HTTP/1.1.
        """
        assert self._transport is not None
        self.status, self.reusable, self._buffer, self._on_body = None, False, b"", on_body
        self._completion = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._completion

    def close(self) -> None:
        """Abort the connection, and the exchange if one is running."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._completion is None or self._completion.done():
            self.close()  # no request asked for this
            return
        try:
            body = self._parse_head(data) if self.status is None else data
            if body is not None and (
                self._parse_chunks(body, now) if self._chunked else self._parse_unchunked(body, now)
            ):
                self._complete(now)
        except (ValueError, IndexError) as error:
            self._completion.set_exception(ValueError(f"not HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._completion is None or self._completion.done():
            return
        if self.status is not None and not self._chunked and self._remaining is None:  # the close ends the body
            self._complete(time.perf_counter())
        else:
            self._completion.set_exception(error or ConnectionError("the server closed the connection"))

    def _complete(self, now: float) -> None:
        assert self._completion is not None
        self.idle_since, self.reusable = now, self._keep_alive
        self._completion.set_result(now)

    def _parse_head(self, data: bytes) -> bytes | None:
        """Parse the head. Returns the beginning of the body, None while the head is incomplete."""
        head, end, body = (self._buffer + data).partition(b"\r\n\r\n")
        if not end:
            self._buffer = head
            return None
        status, *lines = head.decode("latin-1").lower().split("\r\n")
        headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(status.split(" ")[1])
        self._chunked = "chunked" in headers.get("transfer-encoding", "")
        self._remaining = int(headers["content-length"]) if "content-length" in headers and not self._chunked else None
        is_framed = self._chunked or self._remaining is not None
        self._keep_alive = is_framed and status.startswith("http/1.1") and headers.get("connection") != "close"
        self._buffer = b""
        return body

    def _parse_unchunked(self, body: bytes, now: float) -> bool:
        assert self.status is not None
        self._on_body(self.status, body, now)
        if self._remaining is None:
            return False
        self._remaining -= len(body)
        return self._remaining <= 0

    def _parse_chunks(self, data: bytes, now: float) -> bool:
        assert self.status is not None
        buffer = self._buffer + data
        while (line := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line].split(b";")[0], 16)
            if size == 0:
                self._buffer = buffer
                return buffer.endswith(b"\r\n\r\n")
            start, end = line + 2, line + 2 + size
            if len(buffer) < end + 2:
                break
            self._on_body(self.status, buffer[start:end], now)
            buffer = buffer[end + 2 :]
        self._buffer = buffer
        return False
