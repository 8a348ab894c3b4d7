"""Streamed chat completions of any OpenAI-compatible server, with the time at which each piece of text came.

The wire under `corral bench`. While an answer runs, its events are only searched and stamped; what is in them is read
when it has ended. No proxies, no redirects. Knows neither workloads nor statistics.
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
    """A request that got no whole answer. `status`: of HTTP, 0 if none came, None if no server was reached."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts that a server gives; None is what it does not tell."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Times are readings of `time.perf_counter`, in seconds.

    Attributes:
        text_at: when each piece of text arrived; pieces of one packet have one time.
        text: what was said; empty unless it was asked for.
    """

    sent_at: float
    text_at: tuple[float, ...]
    ended_at: float
    usage: Usage | None
    text: str


class ChatServer:
    """An OpenAI-compatible server, with as many connections as there are requests at a time.

    Args:
        url: where the API is, with or without `/v1` at the end.
        api_key: sent as bearer token.
        verify: whether an https server's certificate is checked.
        timeout_s: how long a request may take.

    Raises ConfigError if the URL or the key cannot be sent.
    """

    def __init__(self, url: str, api_key: str | None = None, *, verify: bool = True, timeout_s: float = 600.0) -> None:
        try:
            parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is no URL ({error}): write for example {DEFAULT_URL}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
            raise ConfigError(f"{url!r} is no http:// or https:// URL of a server: write for example {DEFAULT_URL}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that no header can hold: check --api-key or its variable")
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
        """The ids that the server lists, at least one. Raises RequestFailed."""
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
        """Send a chat completion request with `stream` on, and wait for all of its answer.

        Raises:
            RequestFailed: no connection, another status than 200, an error event, a broken or an empty answer.
        """
        content = json.dumps(body).encode()
        request = f"{self._head}content-length: {len(content)}\r\n\r\n".encode() + content
        events = _Events(keep_text)
        sent_at = time.perf_counter()
        connection = await self._connected()
        try:
            async with asyncio.timeout(self._timeout_s):
                ended_at = await connection.exchange(request, events.take)
            return events.answer(sent_at, ended_at)
        except TimeoutError as error:
            raise RequestFailed(
                f"no whole answer within {self._timeout_s:g} s: ask for fewer tokens, or give a longer --timeout", 0
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestFailed(
                f"the answer broke off, or is malformed ({type(error).__name__}: {error})", connection.status or 0
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

    async def _connected(self) -> Connection:
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
                f"the certificate of {self.url} does not verify ({error.verify_message}): "
                "if it is one of your own, give --insecure"
            ) from error
        except (OSError, TimeoutError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "no answer in time"
            raise RequestFailed(f"no server answers at {self.url} ({why}): start one, or give its URL") from error


class _Events:
    """What has come back for one request so far."""

    def __init__(self, keep_text: bool) -> None:
        self._keep_text = keep_text
        self._text_at: list[float] = []
        self._text: list[bytes] = []
        self._usage: bytes | None = None
        self._error: bytes | None = None
        self._status = 0
        self._rest = b""  # a line whose end has not come; all of the body if this is no answer

    def take(self, status: int, body: bytes, now: float) -> None:
        """Note the events in the next bytes of the body."""
        self._status = status
        if status != 200:
            self._rest += body
            return
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
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
        """All of it. Raises RequestFailed if it is none, ValueError, KeyError or TypeError if it is malformed."""
        if self._status not in (0, 200):
            raise RequestFailed(f"{self._status}: {_message(self._rest)}", self._status)
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


def _usage(given: Any) -> Usage:
    details = given.get("prompt_tokens_details") or {}
    return Usage(given.get("prompt_tokens"), given.get("completion_tokens"), details.get("cached_tokens"))


def _message(body: bytes) -> str:
    """What an error's body says, in one line: OpenAI's form, FastAPI's, or its beginning."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        if isinstance(error, dict):
            error = error.get("error") or error.get("message") or error.get("detail") or error
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "no text"
