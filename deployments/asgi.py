"""ASGI building blocks of the HTTP applications: what a body may be, HEAD, other origins, and the mount prefix."""

import zlib
from collections.abc import Callable, Sequence

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge, ServeError, UnsupportedBody, error_response

MAX_BODY_BYTES = 2 * 1024 * 1024


class BodyLimitMiddleware:
    """Responds with 413 as soon as a body exceeds `max_body_bytes`, whether or not it has a content-length.

    Decompresses a body with `content-encoding: gzip` to at most as many bytes; other encodings get a 415.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        content_length = headers.get("content-length", "0")
        if content_length.isdecimal() and int(content_length) > self._max_body_bytes:
            await _respond(self._too_large(), scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await _respond(self._too_large(), scope, receive, send)
                return
            if not message.get("more_body"):
                break
        try:
            decoded = self._decoded(bytes(body), headers.get("content-encoding", "identity").strip().lower())
        except ServeError as error:
            await _respond(error, scope, receive, send)
            return
        if "content-encoding" in headers:
            del headers["content-encoding"]
            headers["content-length"] = str(len(decoded))
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": decoded, "more_body": False}

        await self._app(scope, replay, send)

    def _decoded(self, body: bytes, encoding: str) -> bytes:
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "x-gzip"):
            raise UnsupportedBody(f"content-encoding {encoding!r:.40} is not supported: send gzip, or no encoding")
        decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header
        try:
            decoded = decompressor.decompress(body, self._max_body_bytes + 1)
        except zlib.error as error:
            raise UnsupportedBody(f"the body is not gzip, as its content-encoding says: {error}") from error
        if len(decoded) > self._max_body_bytes:
            raise self._too_large()
        if not decompressor.eof or decompressor.unused_data:
            raise UnsupportedBody("the body is not one complete gzip file, as its content-encoding says")
        return decoded

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body is larger than {self._max_body_bytes} bytes: send a smaller one")


async def _respond(error: ServeError, scope: Scope, receive: Receive, send: Send) -> None:
    status, body = error_response(error)
    await JSONResponse(body.model_dump(), status)(scope, receive, send)


class JsonBodyMiddleware:
    """Takes a body for JSON if it has no content-type, or the one that curl adds; other types get a 415."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            headers = MutableHeaders(scope=scope)
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type in ("", "application/x-www-form-urlencoded"):
                headers["content-type"] = "application/json"
            elif media_type != "application/json" and not media_type.endswith("+json"):
                problem = f"content-type {media_type!r:.80} is not supported: send application/json"
                await _respond(UnsupportedBody(problem), scope, receive, send)
                return
        await self._app(scope, receive, send)


class HeadMiddleware:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class CorsMiddleware:
    """Lets web pages of some origins use the API from a browser, with a key.

    Args:
        origins: called at each request; empty allows none, `*` any.
    """

    def __init__(self, app: ASGIApp, origins: Callable[[], Sequence[str]]) -> None:
        self._app = app
        self._origins = origins
        self._with_cors: tuple[Sequence[str], ASGIApp] = ((), app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan begins before the replica is complete
            await self._app(scope, receive, send)
            return
        origins = self._origins()
        if origins != self._with_cors[0]:
            methods = ("GET", "POST", "DELETE")
            allowing = CORSMiddleware(
                self._app, origins, allow_methods=methods, allow_headers=["*"], expose_headers=["*"]
            )
            self._with_cors = (origins, allowing if origins else self._app)
        await self._with_cors[1](scope, receive, send)


def mount_prefix(request: HTTPConnection) -> str:
    """The path at which Ray Serve has mounted the application, such as `/ui`; empty for `/`."""
    return str(request.scope.get("root_path", "")).rstrip("/")
