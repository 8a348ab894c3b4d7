"""Streamed chat completions of any OpenAI-compatible server, with the arrival time of each piece of text.

While an answer is streamed, its events are only searched and timestamped; they are parsed when it has ended. No
proxies, no redirects. Knows neither workloads nor statistics.
"""

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from clients.api import DEFAULT_URL
from clients.bench.connection import Connection
from training.errors import ConfigError, CorralError

# A quote inside a JSON string is escaped, so neither pattern can match within an answer's text.
_TEXT = re.compile(rb'"(?:content|reasoning_content|reasoning)"\s*:\s*"[^"]')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_REUSE_WITHIN_S = 2.0  # servers close idle connections, the earliest after 5 s
_CONNECT_TIMEOUT_S = 10.0


class RequestFailed(CorralError):
    """A request without a complete answer. `status`: of HTTP, 0 if none arrived, None if no server was reached."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the server reports them; None where it does not."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. Times are readings of `time.perf_counter`, in seconds.

    Attributes:
        text_at: arrival time of each piece of text; the pieces of one packet have the same.
        text: the text itself, if it was to be kept, else empty.
    """

    sent_at: float
    text_at: tuple[float, ...]
    ended_at: float
    usage: Usage | None
    text: str


class ChatServer:
    """An OpenAI-compatible server, with one connection per concurrent request.

    Args:
        url: the server's address, with or without `/v1` at the end.
        api_key: sent as a bearer token.
        verify: whether to check an https server's certificate.
        timeout_s: limit for a complete request, in seconds.

    Raises ConfigError if the URL or the key is not valid.
    """

    def __init__(self, url: str, api_key: str | None = None, *, verify: bool = True, timeout_s: float = 600.0) -> None:
        try:
            parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is not a valid URL ({error}): use for example {DEFAULT_URL}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
            raise ConfigError(f"{url!r} is not the http:// or https:// URL of a server: use for example {DEFAULT_URL}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(
                "the API key has characters that a header cannot hold: check --api-key or its environment variable"
            )
        self.url = str(parsed).rstrip("/")
        self._timeout_s = timeout_s
        self._authorization = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls = httpx.create_ssl_context(verify=verify) if parsed.scheme == "https" else None
        self._address = (parsed.host, parsed.port or (443 if self._tls else 80))
        path = parsed.raw_path.decode("ascii").rstrip("/")
        headers = {"host": parsed.netloc.decode("ascii"), "content-type": "application/json", **self._authorization}
        self._head = f"POST {path}/v1/chat/completions HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        self._idle: list[Connection] = []

    async def models(self) -> list[str]:
        """The model ids that the server lists, at least one. Raises RequestFailed."""
        try:
            async with httpx.AsyncClient(verify=self._tls or True, trust_env=False, timeout=30) as client:
                response = await client.get(f"{self.url}/v1/models", headers=self._authorization)
        except httpx.HTTPError as error:
            raise RequestFailed(f"no server answers at {self.url} ({error}): start one, or give its URL") from error
        if response.status_code != 200:
            raise RequestFailed(f"{response.url} answered {response.status_code}: {_message(response.content)}")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if models := [str(model["id"]) for model in response.json()["data"]]:
                return models
        raise RequestFailed(f"{response.url} lists no models: check the URL, or name one with --model")

    async def answer(self, body: Mapping[str, Any], *, keep_text: bool = False) -> Answer:
        """Send a streaming chat completion request, and wait for its complete answer.

        Raises:
            RequestFailed: no connection, a status other than 200, an error event, or an incomplete or empty answer.
        """
        content = json.dumps(body).encode()
        request = f"{self._head}content-length: {len(content)}\r\n\r\n".encode() + content
        events = _Events(keep_text)
        sent_at = time.perf_counter()
        connection = await self._connect()
        try:
            async with asyncio.timeout(self._timeout_s):
                ended_at = await connection.exchange(request, events.feed)
            return events.answer(sent_at, ended_at)
        except TimeoutError as error:
            raise RequestFailed(
                f"no complete answer within {self._timeout_s:g} s: request fewer tokens, or raise --timeout", 0
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestFailed(
                f"the answer is incomplete or malformed ({type(error).__name__}: {error})", connection.status or 0
            ) from error
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.idle_since < _REUSE_WITHIN_S:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                return (await loop.create_connection(Connection, *self._address, ssl=self._tls))[1]
        except ssl.SSLCertVerificationError as error:
            raise RequestFailed(
                f"the certificate of {self.url} cannot be verified ({error.verify_message}): "
                "if you trust this server, pass --insecure"
            ) from error
        except (OSError, TimeoutError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer in time"
            raise RequestFailed(f"no server answers at {self.url} ({reason}): start one, or give its URL") from error


class _Events:
    """The events received so far for one request."""

    def __init__(self, keep_text: bool) -> None:
        self._keep_text = keep_text
        self._text_at: list[float] = []
        self._text: list[bytes] = []
        self._usage: bytes | None = None
        self._error: bytes | None = None
        self._status = 0
        self._buffer = b""  # an incomplete line; the complete body if the status is not 200

    def feed(self, status: int, body: bytes, now: float) -> None:
        """Record the events in the next chunk of the body."""
        self._status = status
        if status != 200:
            self._buffer += body
            return
        lines = (self._buffer + body).split(b"\n")
        self._buffer = lines.pop()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if _TEXT.search(line):
                self._text_at.append(now)
                if self._keep_text:
                    self._text.append(line)
            elif b'"error"' in line and b'"choices"' not in line:
                self._error = line
            if _USAGE.search(line):
                self._usage = line

    def answer(self, sent_at: float, ended_at: float) -> Answer:
        """The complete answer. Raises RequestFailed if it failed, ValueError, KeyError or TypeError if malformed."""
        if self._status not in (0, 200):
            raise RequestFailed(f"{self._status}: {_message(self._buffer)}", self._status)
        if self._error:
            raise RequestFailed(f"an error after the answer began: {_message(_data(self._error))}", 200)
        usage = _usage(json.loads(_data(self._usage))["usage"]) if self._usage else None
        if not self._text_at and not (usage and usage.completion_tokens):
            raise RequestFailed("the answer has no text: is this a chat model behind OpenAI's API?", 200)
        text = "".join(_content(json.loads(_data(line))) for line in self._text)
        return Answer(sent_at, tuple(self._text_at), ended_at, usage, text)


def _data(line: bytes) -> bytes:
    return line.removeprefix(b"data:").strip()


def _content(event: Any) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _usage(counts: Any) -> Usage:
    details = counts.get("prompt_tokens_details") or {}
    return Usage(counts.get("prompt_tokens"), counts.get("completion_tokens"), details.get("cached_tokens"))


def _message(body: bytes) -> str:
    """The message of an error's body in one line: as OpenAI or FastAPI formats it, else the beginning of the body."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        if isinstance(error, dict):
            error = error.get("error") or error.get("message") or error.get("detail") or error
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "no text"
