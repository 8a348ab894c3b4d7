"""Every HTTP request is recorded, including those that reach no route: a wrong key, a broken body, an unknown path.

`RequestTraceMiddleware` opens a `RequestTrace` and closes it when the answer is complete or the client has left; routes
that know more about the request take it as `CurrentTrace` and fill it in.
"""

from collections.abc import Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.accounting.ledger_client import LedgerClient
from deployments.accounting.request_record import CLIENT_LEFT, RequestTrace
from deployments.auth.dependencies import ChatCaller

_KEY = "corral.trace"  # in the scope, which belongs to one request


class RequestTraceMiddleware:
    """The outermost, so that it sees what the others refuse.

    Args:
        ledger: finds this replica's client, which is made after the application.
    """

    def __init__(self, app: ASGIApp, ledger: Callable[[], LedgerClient]) -> None:
        self._app = app
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = scope[_KEY] = RequestTrace()
        whole = False

        async def watch(message: Message) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        with self._ledger().recorded(trace):
            try:
                await self._app(scope, receive, watch)
            finally:
                if (route := scope.get("route")) is not None:
                    trace.route = route.path
                if trace.status and not whole:
                    trace.status = CLIENT_LEFT


async def _current_trace(request: Request, caller: ChatCaller) -> RequestTrace:
    trace = cast(RequestTrace, request.scope[_KEY])
    trace.caller = caller
    return trace


CurrentTrace = Annotated[RequestTrace, Depends(_current_trace)]
