"""Middleware of the chat page against hostile pages and hostile model output: origin check and security headers.

Model output is shown as sanitized HTML. The content security policy is a second line of defense: a script that passes
the sanitizer does not run, and an image or a link preload that passes it cannot contact another host.
"""

import base64
import hashlib
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.auth.origin import is_foreign

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)


class SameOriginMiddleware:
    """Responds 403 to requests from web pages of other hosts that change something or carry a cookie."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if is_foreign(headers) and (scope["method"] not in _SAFE_METHODS or "cookie" in headers):
                response = PlainTextResponse(
                    "requests from pages of other hosts are refused: open this page itself", 403
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SecurityHeadersMiddleware:
    """Adds the headers; the policy of an HTML page allows its inline scripts by hash, and no other inline script."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        html_start: Message | None = None
        page = b""

        async def send_with_headers(message: Message) -> None:
            nonlocal html_start, page
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "same-origin"
                headers["content-security-policy"] = content_security_policy([])
                if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                    html_start = message  # held back until the page's scripts are known
                    return
            elif html_start is not None:
                page += message.get("body", b"")
                if message.get("more_body"):
                    return
                headers = MutableHeaders(scope=html_start)
                headers["content-security-policy"] = content_security_policy(_INLINE_SCRIPT.findall(page))
                await send(html_start)
                html_start, message = None, {"type": "http.response.body", "body": page}
            await send(message)

        await self._app(scope, receive, send_with_headers)


def content_security_policy(inline_scripts: list[bytes]) -> str:
    """A policy under which the page loads from its own origin only and runs its own scripts only."""
    hashes = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in inline_scripts]
    script_src = " ".join(["'self'", *dict.fromkeys(f"'sha256-{digest}'" for digest in hashes)])
    return "; ".join(
        [
            "default-src 'self'",
            f"script-src {script_src}",
            "style-src 'self' 'unsafe-inline'",  # Gradio sets styles on elements
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'self'",
        ]
    )
