"""`/docs`: the API in Swagger UI, without external resources.

FastAPI's own page loads Swagger UI from a CDN. Here its files come from the package `fastapi-offline`, and the content
security policy forbids all others. URLs are relative, so that the page works under any route prefix.
"""

from importlib.resources import files

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from deployments.auth.dependencies import ChatCaller

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Corral: the API</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});'
_MEDIA_TYPES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "favicon.png": "image/png"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_docs(api: FastAPI) -> None:
    """Add the page and its files under `/docs`, for callers who may use the API."""
    api.add_api_route("/docs", _docs, include_in_schema=False)
    api.add_api_route("/docs/{name}", _docs_file, include_in_schema=False)


async def _docs(caller: ChatCaller) -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_HEADERS)


def _docs_file(name: str, caller: ChatCaller) -> Response:  # not a coroutine, so that FastAPI runs it in a thread
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_HEADERS)
    if name not in _MEDIA_TYPES:
        raise HTTPException(404, f"no such file: /docs/{name:.80}")
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    headers = {**_HEADERS, "cache-control": "private, max-age=3600"}
    return Response(content, media_type=_MEDIA_TYPES[name], headers=headers)
