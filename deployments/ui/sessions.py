"""Sessions of the chat page, and the middleware that requires one.

The cookie is signed and contains the id of an API key, never the key. The key is looked up again for every request and
every question, so a session ends with its key, and after a day at the latest. A server without keys needs no sessions.
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

from deployments.asgi import mount_prefix
from deployments.auth.caller import Caller
from deployments.auth.dependencies import anonymous, unreadable_keys_logged
from deployments.auth.keys import KeyStore
from deployments.errors import InvalidKey, ServeError, error_response
from training.home import replace_private_file

_COOKIE = "corral_session"
_MAX_AGE_S = 24 * 60 * 60
_SECRET_BYTES = 32


class Sessions:
    """Starts and ends sessions, and looks up the caller of a session.

    The signing secret is the file `ui_secret` beside the keys, so that sessions survive a restart of the server.
    """

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self._signer = TimestampSigner(_secret(store.path.with_name("ui_secret")), digest_method=hashlib.sha256)

    async def caller(self, request: HTTPConnection) -> Caller:
        """The caller of a request.

        Raises:
            InvalidKey: there is no session, or its key is no longer valid.
            OriginRefused: the server has no keys, and the request comes from a web page of another host.
            KeysUnreadable: the key file is broken.
        """
        with unreadable_keys_logged():
            if not self.store.required:
                return await anonymous(request.headers)
            try:
                key_id = self._signer.unsign(request.cookies.get(_COOKIE, ""), max_age=_MAX_AGE_S).decode()
            except BadSignature:
                raise InvalidKey("not logged in, or the session has expired: reload the page to log in") from None
            return self.store.caller(key_id)

    def start(self, key: str, request: Request, response: Response) -> None:
        """Start a session for `key` with a cookie in `response`.

        Raises:
            InvalidKey: the key is not accepted.
            KeysUnreadable: the key file is broken.
        """
        with unreadable_keys_logged():
            key_id = self.store.authenticate(key).key_id
        assert key_id is not None
        response.set_cookie(
            _COOKIE,
            self._signer.sign(key_id).decode(),
            max_age=_MAX_AGE_S,
            path=f"{mount_prefix(request)}/",
            secure=_is_https(request),
            httponly=True,
            samesite="strict",
        )

    def end(self, request: Request, response: Response) -> None:
        """End the session by deleting its cookie in `response`."""
        response.delete_cookie(_COOKIE, path=f"{mount_prefix(request)}/", httponly=True, samesite="strict")


class SessionMiddleware:
    """Passes requests with a session to `app`; redirects page loads without one to `/login`, and refuses the rest."""

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self._app = app
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the page uses no WebSocket
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
        return RedirectResponse(f"{mount_prefix(request)}/login", 303)
    return JSONResponse({"detail": str(error)}, error_response(error)[0])  # the format that Gradio's script expects


def _is_https(request: Request) -> bool:
    """Whether the browser uses HTTPS, also if a proxy terminates TLS: `Origin` has the scheme of the address bar."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


def _secret(path: Path) -> bytes:
    with FileLock(f"{path}.lock", mode=0o600):
        if not path.exists() or path.stat().st_size != _SECRET_BYTES:
            replace_private_file(path, secrets.token_bytes(_SECRET_BYTES))
        return path.read_bytes()
