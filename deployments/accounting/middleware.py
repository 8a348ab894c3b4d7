"""Every HTTP request of the API is booked, also those that no route sees: a wrong key, a broken body, an unknown path.

BookingMiddleware opens a Booking and closes it when the answer is whole or the client has left; routes that know more
of the request take it as `CurrentBooking` and fill it in.
"""

from collections.abc import Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.accounting.ledger_client import LedgerClient
from deployments.accounting.request_record import CLIENT_LEFT, Booking
from deployments.auth.dependencies import ChatCaller

_KEY = "corral.booking"  # in the scope, which belongs to one request


class BookingMiddleware:
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
        booking = scope[_KEY] = Booking()
        whole = False

        async def watch(message: Message) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                booking.status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        with self._ledger().booked(booking):
            try:
                await self._app(scope, receive, watch)
            finally:
                if (route := scope.get("route")) is not None:
                    booking.route = route.path
                if booking.status and not whole:
                    booking.status = CLIENT_LEFT


async def _current_booking(request: Request, caller: ChatCaller) -> Booking:
    booking = cast(Booking, request.scope[_KEY])
    booking.caller = caller
    return booking


CurrentBooking = Annotated[Booking, Depends(_current_booking)]
