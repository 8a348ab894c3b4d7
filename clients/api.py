"""CorralClient: a Python client for a Corral server, over httpx.

Text in, text out: for the rest of OpenAI's API, point the `openai` package at the same address. Importing this module
needs neither torch nor Ray.
"""

import json
import ssl
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from deployments.auth.origin import is_loopback as is_loopback_host
from deployments.protocol.adapters import Adapter, AdapterChange, AdapterList, DeletedVersion
from deployments.protocol.base import ErrorResponse
from deployments.protocol.chat import ChatCompletion, ChatCompletionChunk, ChoiceDelta
from deployments.protocol.models import Model, ModelList
from training.chat.messages import Message
from training.errors import CorralError

DEFAULT_URL = "http://127.0.0.1:8000"

_Model = TypeVar("_Model", bound=BaseModel)


class ServerError(CorralError):
    """The server refused a request, failed during an answer, or cannot be reached.

    Attributes:
        status: the HTTP status; None if there was no response, or if a streamed answer failed after it began.
        code: the server's name for the error, such as `model_not_found`.
        param: the request field that the error is about.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Sampling(TypedDict, total=False):
    """Sampling parameters; omitted ones take the server's defaults. See the server's `/docs` for ranges."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop: str | list[str]


class CorralClient:
    """A client for one server. As a context manager, it closes its connections on exit.

    Args:
        base_url: the server's address, with or without `/v1` at the end.
        api_key: sent as a bearer token, if the server or a proxy in front of it requires one.
        ca: for https: a PEM file of certificates to trust instead of the public authorities, such as the server's own.
        timeout_s: the longest wait, in seconds, for the next bytes of a response.

    Every method raises ServerError.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        ca: str | Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx.Timeout(timeout_s, connect=10.0),
                verify=_ssl_context(ca) if ca else True,
                trust_env=not is_loopback(self.base_url),  # no proxy reaches this machine's loopback
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{base_url!r} is not a valid URL ({error}): use for example {DEFAULT_URL}") from error

    def chat(self, messages: str | Sequence[Message], *, model: str, **sampling: Unpack[Sampling]) -> str:
        """The complete answer to a dialog, or to a single user message given as text."""
        body = _body(messages, model, sampling)
        with _ServerErrors(self.base_url):
            response = self._http.post("/v1/chat/completions", content=body, headers=_JSON)
            _raise_for_status(response)
            return ChatCompletion.model_validate_json(response.content).choices[0].message.content or ""

    def stream(
        self, messages: str | Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
    ) -> Generator[str, None, None]:
        """Yield the answer as it is generated; closing the iterator cancels the request on the server."""
        for delta in self.stream_deltas(messages, model=model, **sampling):
            if delta.content:
                yield delta.content

    def stream_deltas(
        self,
        messages: str | Sequence[Message],
        *,
        model: str,
        tools: Sequence[dict[str, Any]] = (),
        **sampling: Unpack[Sampling],
    ) -> Generator[ChoiceDelta, None, None]:
        """Yield what is added to the answer, text and calls of `tools`, which are in OpenAI's form."""
        body = _body(messages, model, sampling, stream=True, tools=tools)
        with (
            _ServerErrors(self.base_url),
            self._http.stream("POST", "/v1/chat/completions", content=body, headers=_JSON) as response,
        ):
            if response.status_code != 200:
                response.read()
                _raise_for_status(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if error := _error_in(data):
                    raise error
                chunk = ChatCompletionChunk.model_validate_json(data)
                for choice in chunk.choices:
                    yield choice.delta
        raise ServerError(f"the answer from {self.base_url} ended early: send the request again")

    def models(self) -> list[Model]:
        """Models that the server accepts: the base first, then every adapter version."""
        with _ServerErrors(self.base_url):
            response = self._http.get("/v1/models")
            _raise_for_status(response)
            return ModelList.model_validate_json(response.content).data

    def adapters(self) -> list[Adapter]:
        """Every adapter with its versions and traffic. This and all methods below need the 'admin' scope."""
        return self._call("GET", "/v1/adapters", AdapterList).data

    def adapter(self, name: str) -> Adapter:
        """One adapter, by name."""
        return self._call("GET", _adapter_path(name), Adapter)

    def promote(self, name: str, version: int, alias: str, percent: float) -> AdapterChange:
        """Point an alias at a version; below 100 percent, the version becomes a canary beside the champion."""
        body = {"version": version, "percent": percent, "alias": alias}
        return self._call("POST", f"{_adapter_path(name)}/promote", AdapterChange, body)

    def rollback(self, name: str, alias: str) -> AdapterChange:
        """End the canary; if there is none, point the alias at its previous version."""
        return self._call("POST", f"{_adapter_path(name)}/rollback", AdapterChange, {"alias": alias})

    def delete_version(self, name: str, version: int) -> DeletedVersion:
        """Delete a version permanently."""
        return self._call("DELETE", f"{_adapter_path(name)}/versions/{version}", DeletedVersion)

    def _call(self, method: str, path: str, model: type[_Model], body: dict[str, Any] | None = None) -> _Model:
        with _ServerErrors(self.base_url):
            response = self._http.request(method, path, json=body)
            _raise_for_status(response)
            return model.model_validate_json(response.content)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "CorralClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _ServerErrors:
    """Context manager that raises connection errors and invalid responses as ServerError."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ServerError(
                f"the certificate of {self._url} is not trusted ({str(error).partition('failed: ')[2]}): pass its "
                "certificate with --ca FILE; 'corral certs show' on the server prints the path"
            ) from error
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ServerError(
                f"no server answers at {self._url}: start one with 'corral serve', or give its URL"
            ) from error
        if isinstance(error, httpx.UnsupportedProtocol):
            raise ServerError(
                f"{self._url!r} is not an http:// or https:// URL: use for example {DEFAULT_URL}"
            ) from error
        if isinstance(error, httpx.TimeoutException):
            raise ServerError(f"{self._url} timed out: try again, or request fewer tokens") from error
        if isinstance(error, httpx.HTTPError):
            raise ServerError(f"the connection to {self._url} was lost ({error}): send the request again") from error
        if isinstance(error, ValidationError):
            raise ServerError(f"{self._url} answered, but not like a Corral server: check the URL") from error


_JSON = {"content-type": "application/json"}


def _adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _ssl_context(ca: str | Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # includes ssl.SSLError
        reason = "it contains no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ServerError(f"--ca {str(ca)!r} cannot be used: {reason}") from error


def is_loopback(url: str) -> bool:
    """Whether the host of `url` is a loopback address of this machine."""
    return is_loopback_host(httpx.URL(url).host)


def _body(
    messages: str | Sequence[Message],
    model: str,
    sampling: Sampling,
    *,
    stream: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> bytes:
    dialog = [Message("user", messages)] if isinstance(messages, str) else messages
    body: dict[str, Any] = {"model": model, "messages": [*map(_turn, dialog)], "stream": stream, **sampling}
    if tools:
        body["tools"] = tools
    return json.dumps(body).encode()  # escaped to ASCII: invalid Unicode is left for the server to refuse


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    if error := _error_in(response.text, response.status_code):
        raise error
    raise ServerError(
        f"{response.request.url} answered {response.status_code} without a Corral error: check the URL",
        status=response.status_code,
    )


def _error_in(text: str, status: int | None = None) -> ServerError | None:
    try:
        error = ErrorResponse.model_validate_json(text).error
    except ValidationError:
        return None
    return ServerError(error.message, status=status, code=error.code, param=error.param)
