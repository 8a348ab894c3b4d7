"""ASGI building blocks shared by the HTTP applications: a limit on the body size, and the mount prefix."""

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge, error_response

MAX_BODY_BYTES = 2 * 1024 * 1024


class BodyLimitMiddleware:
    """Responds with 413 as soon as a body exceeds `max_body_bytes`, whether or not it has a content-length."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        content_length = Request(scope).headers.get("content-length", "0")
        if content_length.isdecimal() and int(content_length) > self._max_body_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(f"the request body is larger than {self._max_body_bytes} bytes: send a smaller one")
        status, body = error_response(error)
        await JSONResponse(body.model_dump(), status)(scope, receive, send)


def mount_prefix(request: HTTPConnection) -> str:
    """The path at which Ray Serve has mounted the application, such as `/ui`; empty for `/`."""
    return str(request.scope.get("root_path", "")).rstrip("/")
