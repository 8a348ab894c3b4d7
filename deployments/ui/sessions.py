"""Who is logged in to the chat page, and the wall that nobody else gets through.

The cookie is signed and names a key's id, never the key. At every request and every question the key is looked up anew:
a session ends with its key, and at the latest after a day. Where there are no keys, nobody needs a session.
"""

import hashlib
import secrets
from pathlib import Path

from filelock import FileLock
from itsdangerous import BadSignature, TimestampSigner
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments.asgi import prefix
from deployments.auth.caller import Caller
from deployments.auth.dependencies import anonymous, unreadable_keys_logged
from deployments.auth.keys import KeyStore
from deployments.errors import InvalidKey, ServeError, error_response
from training.home import replace_private_file

_COOKIE = "corral_session"
_MAX_AGE_S = 24 * 60 * 60
_SECRET_BYTES = 32


class Sessions:
    """Makes sessions out of keys, and callers out of sessions.

    The signature's secret is the file `ui_secret` beside the keys, so that a session outlives a restart of the server.
    """

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self._signer = TimestampSigner(_secret(store.path.with_name("ui_secret")), digest_method=hashlib.sha256)

    async def caller(self, request: HTTPConnection) -> Caller:
        """Who sends this.

        Raises:
            InvalidKey: there is no session, or its key is not valid any more.
            OriginRefused: there are no keys, and the request comes from elsewhere.
            KeysUnreadable: the file of keys is broken.
        """
        with unreadable_keys_logged():
            if not self.store.required:
                return await anonymous(request.headers)
            try:
                key_id = self._signer.unsign(request.cookies.get(_COOKIE, ""), max_age=_MAX_AGE_S).decode()
            except BadSignature:
                raise InvalidKey("nobody is logged in, or not any more: load the page again to log in") from None
            return self.store.caller(key_id)

    def begin(self, key: str, request: Request, response: Response) -> None:
        """Let `response` log in whoever sends `key`.

        Raises:
            InvalidKey: the key is not accepted.
            KeysUnreadable: the file of keys is broken.
        """
        with unreadable_keys_logged():
            key_id = self.store.authenticate(key).key_id
        assert key_id is not None
        response.set_cookie(
            _COOKIE,
            self._signer.sign(key_id).decode(),
            max_age=_MAX_AGE_S,
            path=f"{prefix(request)}/",
            secure=_is_https(request),
            httponly=True,
            samesite="strict",
        )

    def end(self, request: Request, response: Response) -> None:
        """Let `response` log out."""
        response.delete_cookie(_COOKIE, path=f"{prefix(request)}/", httponly=True, samesite="strict")


class SessionMiddleware:
    """Lets through to `app` who is logged in; sends a browser that opens a page to `/login`."""

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self._app = app
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing behind it wants a WebSocket
            await WebSocketClose()(scope, receive, send)
            return
        request = Request(scope)
        try:
            await self._sessions.caller(request)
        except ServeError as error:
            await _refusal(request, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refusal(request: Request, error: ServeError) -> Response:
    opens_page = request.method in ("GET", "HEAD") and "text/html" in request.headers.get("accept", "")
    if isinstance(error, InvalidKey) and opens_page:
        return RedirectResponse(f"{prefix(request)}/login", 303)
    return JSONResponse({"detail": str(error)}, error_response(error)[0])  # as the page's own script expects it


def _is_https(request: Request) -> bool:
    """Also where a proxy ends TLS: a browser says in `Origin` what it has in its address bar."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


def _secret(path: Path) -> bytes:
    with FileLock(f"{path}.lock", mode=0o600):
        if not path.exists() or path.stat().st_size != _SECRET_BYTES:
            replace_private_file(path, secrets.token_bytes(_SECRET_BYTES))
        return path.read_bytes()
