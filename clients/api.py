"""CorralClient: a Corral server from Python, over httpx.

For programs that want no more than text in and text out; whoever needs the whole of OpenAI's API points the `openai`
package at the same address. Importing this needs neither torch nor Ray.
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
from deployments.protocol.chat import ChatCompletion, ChatCompletionChunk
from deployments.protocol.models import Model, ModelList
from training.chat.messages import Message
from training.errors import CorralError

DEFAULT_URL = "http://127.0.0.1:8000"

_Answer = TypeVar("_Answer", bound=BaseModel)


class ServerError(CorralError):
    """The server refused a request, broke off an answer, or cannot be reached.

    Attributes:
        status: the HTTP status, None where there was no answer or one that had begun.
        code: the server's name for the error, such as `model_not_found`.
        param: the field of the request that it is about.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Sampling(TypedDict, total=False):
    """How an answer is drawn; what is left out is the server's default. See `/docs` of the server for ranges."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop: str | list[str]


class CorralClient:
    """One server. Usable as a context manager, which closes its connections.

    Args:
        base_url: where the API is, with or without `/v1` at the end.
        api_key: sent as bearer token, if the server or a proxy in front of it asks for one.
        ca: for https: the certificates to trust instead of the public authorities', as PEM, such as the server's own.
        timeout_s: the longest silence to bear between two bytes of an answer.

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
                verify=_trusting(ca) if ca else True,
                trust_env=not is_loopback(self.base_url),  # a proxy of the environment does not reach our loopback
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{base_url!r} is no URL ({error}): write for example {DEFAULT_URL}") from error

    def chat(self, messages: str | Sequence[Message], *, model: str, **sampling: Unpack[Sampling]) -> str:
        """The whole answer to a dialog, or to one user message given as text."""
        body = _body(messages, model, sampling)
        with self._sending():
            response = self._http.post("/v1/chat/completions", content=body, headers=_JSON)
            _raise_for_status(response)
            return ChatCompletion.model_validate_json(response.content).choices[0].message.content

    def stream(
        self, messages: str | Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
    ) -> Generator[str, None, None]:
        """The answer piece by piece; closing the iterator stops the server's work on it."""
        body = _body(messages, model, sampling, stream=True)
        with (
            self._sending(),
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
                    if choice.delta.content:
                        yield choice.delta.content
        raise ServerError(f"the answer of {self.base_url} broke off: send the request again")

    def models(self) -> list[Model]:
        """What can be named as `model`: the base first, then every adapter version that it serves."""
        with self._sending():
            response = self._http.get("/v1/models")
            _raise_for_status(response)
            return ModelList.model_validate_json(response.content).data

    def adapters(self) -> list[Adapter]:
        """Every adapter with its versions, and where its traffic goes; as all that follow, for keys of scope admin."""
        return self._call("GET", "/v1/adapters", AdapterList).data

    def adapter(self, name: str) -> Adapter:
        """One of them."""
        return self._call("GET", _adapter_path(name), Adapter)

    def promote(self, name: str, version: int, alias: str, percent: float) -> AdapterChange:
        """Point an alias at a version; below 100 percent as a canary beside the champion."""
        body = {"version": version, "percent": percent, "alias": alias}
        return self._call("POST", f"{_adapter_path(name)}/promote", AdapterChange, body)

    def rollback(self, name: str, alias: str) -> AdapterChange:
        """End the canary, or point an alias at what it pointed at before."""
        return self._call("POST", f"{_adapter_path(name)}/rollback", AdapterChange, {"alias": alias})

    def delete_version(self, name: str, version: int) -> DeletedVersion:
        """Remove a version for good."""
        return self._call("DELETE", f"{_adapter_path(name)}/versions/{version}", DeletedVersion)

    def _call(self, method: str, path: str, answer: type[_Answer], body: dict[str, Any] | None = None) -> _Answer:
        with self._sending():
            response = self._http.request(method, path, json=body)
            _raise_for_status(response)
            return answer.model_validate_json(response.content)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "CorralClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _sending(self) -> "_Sending":
        return _Sending(self.base_url)


class _Sending:
    """Turns what goes wrong on the way to a server and back into ServerError."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ServerError(
                f"the certificate of {self._url} is not trusted ({str(error).partition('failed: ')[2]}): give the one "
                "to trust with --ca FILE; 'corral certs show' on the server names its own"
            ) from error
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise ServerError(
                f"no server answers at {self._url}: start one with 'corral serve', or give its URL"
            ) from error
        if isinstance(error, httpx.UnsupportedProtocol):
            raise ServerError(
                f"{self._url!r} is no http:// or https:// URL: write for example {DEFAULT_URL}"
            ) from error
        if isinstance(error, httpx.TimeoutException):
            raise ServerError(f"{self._url} was silent for too long: try again, or ask for fewer tokens") from error
        if isinstance(error, httpx.HTTPError):
            raise ServerError(f"the connection to {self._url} broke ({error}): send the request again") from error
        if isinstance(error, ValidationError):
            raise ServerError(f"{self._url} answers, but not as a Corral server does: check the URL") from error


_JSON = {"content-type": "application/json"}


def _adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _trusting(ca: str | Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        reason = "it holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise ServerError(f"--ca {str(ca)!r} cannot be used: {reason}") from error


def is_loopback(url: str) -> bool:
    """Whether `url` names this very machine."""
    return is_loopback_host(httpx.URL(url).host)


def _body(messages: str | Sequence[Message], model: str, sampling: Sampling, *, stream: bool = False) -> bytes:
    dialog = [Message("user", messages)] if isinstance(messages, str) else messages
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in dialog],
        "stream": stream,
        **sampling,
    }
    return json.dumps(body).encode()  # ASCII: what is no valid Unicode is the server's to refuse


def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    if error := _error_in(response.text, response.status_code):
        raise error
    raise ServerError(
        f"{response.request.url} answered {response.status_code} and no Corral error: check the URL",
        status=response.status_code,
    )


def _error_in(text: str, status: int | None = None) -> ServerError | None:
    try:
        error = ErrorResponse.model_validate_json(text).error
    except ValidationError:
        return None
    return ServerError(error.message, status=status, code=error.code, param=error.param)
