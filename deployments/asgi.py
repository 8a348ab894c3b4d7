"""ASGI building blocks of every HTTP application: the limit on a body's size, and the prefix an app is mounted at."""

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge, error_response

MAX_BODY_BYTES = 2 * 1024 * 1024


class BodyLimitMiddleware:
    """Answers 413 as soon as a body is longer than `max_body_bytes`, announced or not."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Request(scope).headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
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
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(f"the request body is over {self._max_body_bytes} bytes: send less")
        status, body = error_response(error)
        await JSONResponse(body.model_dump(), status)(scope, receive, send)


def prefix(request: HTTPConnection) -> str:
    """Where Ray Serve has mounted the application, such as `/ui`; nothing for `/`."""
    return str(request.scope.get("root_path", "")).rstrip("/")
