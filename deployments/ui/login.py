"""Routes `/login` and `/logout` of the chat page; the form loads no other resources."""

import html
import time
from collections import deque
from urllib.parse import parse_qs

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from deployments.asgi import mount_prefix
from deployments.errors import InvalidKey, KeysUnreadable, ServeError, error_response
from deployments.ui.sessions import Sessions

_MAX_FAILURES = 10
_WINDOW_S = 60.0

_FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: log in</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ min-height: 100dvh; margin: 0; display: grid; place-items: center; }}
form {{ width: min(26rem, 90vw); display: grid; gap: .75rem; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
input, button {{ font: inherit; padding: .6rem .8rem; border-radius: 10px; border: 1px solid #8888; }}
button {{ background: #f97316; border-color: #f97316; color: #fff; cursor: pointer; }}
[role=alert] {{ color: #dc2626; margin: 0; }}
</style>
</head>
<body>
<form method="post" action="{action}">
<h1>{title}</h1>
<label for="key">Your API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" spellcheck="false" required autofocus>
<button>Log in</button>
{alert}
</form>
</body>
</html>
"""


def login_routes(sessions: Sessions, title: str) -> APIRouter:
    """`GET /login`, `POST /login` and `POST /logout`: the only routes of the page that need no session."""
    router = APIRouter()
    failed_logins = _FailedLogins()

    def form(request: Request, status: int = 200, error: str = "") -> HTMLResponse:
        alert = f'<p role="alert">{html.escape(error)}</p>' if error else ""
        action = html.escape(f"{mount_prefix(request)}/login")
        page = _FORM.format(title=html.escape(title), action=action, alert=alert)
        return HTMLResponse(page, status, {"cache-control": "no-store"})

    @router.get("/login")
    async def show_form(request: Request) -> Response:
        try:
            await sessions.caller(request)
        except InvalidKey:
            return form(request)
        except ServeError as error:
            return form(request, error_response(error)[0], str(error))
        return RedirectResponse(f"{mount_prefix(request)}/", 303)

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        if wait_s := failed_logins.wait_s():
            refusal = form(request, 429, f"Too many attempts: wait {wait_s} seconds.")
            refusal.headers["retry-after"] = str(wait_s)
            return refusal
        response = RedirectResponse(f"{mount_prefix(request)}/", 303)
        try:
            sessions.start(_submitted_key(await request.body()), request, response)
        except InvalidKey as error:
            failed_logins.add()
            return form(request, 401, str(error))
        except KeysUnreadable as error:
            return form(request, 500, str(error))
        return response

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        response = RedirectResponse(f"{mount_prefix(request)}/login", 303)
        sessions.end(request, response)
        return response

    return router


class _FailedLogins:
    """Times of recent failed logins, from all clients together: behind a proxy all have the same address."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MAX_FAILURES)

    def add(self) -> None:
        self._times.append(time.monotonic())

    def wait_s(self) -> int:
        """Seconds until the next attempt is allowed; 0 is now."""
        if len(self._times) < _MAX_FAILURES:
            return 0
        return max(0, round(self._times[0] + _WINDOW_S - time.monotonic() + 0.5))


def _submitted_key(body: bytes) -> str:
    try:
        return parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)["key"][0].strip()
    except (ValueError, KeyError):
        return ""
