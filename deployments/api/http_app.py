"""The FastAPI application under the ingress: what every HTTP request meets before and after its route.

A limit on the body's size, and every error in OpenAI's shape. The routes are `ingress.py`'s; Ray Serve's proxy puts
`x-request-id` on every response and into its log.
"""

import logging
from typing import Annotated, Any

from fastapi import FastAPI, Header
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from deployments.api.docs_page import add_docs
from deployments.asgi import MAX_BODY_BYTES, BodyLimitMiddleware, prefix
from deployments.auth.dependencies import ChatCaller
from deployments.errors import RateLimited, error_body, error_response
from deployments.protocol.base import ErrorResponse
from training.errors import CorralError

_HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}

RequestId = Annotated[str | None, Header(alias="x-request-id", include_in_schema=False)]  # none without Ray's proxies

logger = logging.getLogger("ray.serve")


def create_api() -> FastAPI:
    """An application whose only routes are its own documentation's."""
    api = FastAPI(
        title="Corral",
        description="Llama chat models and their adapters, OpenAI-compatible.",
        openapi_url=None,  # its own routes would ask nobody for a key
        # Also keeps FastAPI from announcing 422 in its own shape, which is never answered.
        responses={"default": {"model": ErrorResponse, "description": "Any other error."}},
    )
    api.add_api_route("/openapi.json", _openapi, include_in_schema=False)
    add_docs(api)
    api.add_exception_handler(CorralError, _answer_corral_error)
    api.add_exception_handler(RequestValidationError, _answer_validation_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(Exception, _answer_unexpected)
    api.add_middleware(BodyLimitMiddleware, max_body_bytes=MAX_BODY_BYTES)
    return api


async def _openapi(request: Request, caller: ChatCaller) -> JSONResponse:
    schema = request.app.openapi()
    servers = [{"url": prefix(request)}] if prefix(request) else []
    return JSONResponse({**schema, "servers": servers} if servers else schema)


async def _answer_corral_error(_: Request, error: Exception) -> JSONResponse:
    status, body = error_response(error)
    headers = error.headers if isinstance(error, RateLimited) else _HEADERS.get(status)
    return JSONResponse(body.model_dump(), status, headers)


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        body = error_body(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    else:
        where = _place(first, error.body)
        for other in errors[1:]:  # of the types of a union that pydantic tried, the one that got furthest
            deeper = _place(other, error.body)
            if len(deeper) > len(where) and deeper[: len(where)] == where:
                first, where = other, deeper
        param = ".".join(where) or None
        message = first["msg"].removeprefix("Value error, ")
        body = error_body(400, f"{param or 'the body'}: {message}", param)
    return JSONResponse(body.model_dump(), 400)


def _place(error: dict[str, Any], body: Any) -> list[str]:
    """Where in the body the error is, without the names of a union's types."""
    found = []
    for part in error["loc"][1:]:
        inside = isinstance(body, dict) and part in body
        inside |= isinstance(body, list) and isinstance(part, int) and part < len(body)
        if inside or error["type"] == "missing" or body is None:
            found.append(str(part))
        if inside:
            body = body[part]
    return found


async def _answer_http_exception(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if message == "There was an error parsing the body":  # FastAPI's word for what its JSON parser gave up on
        message = "the body is not acceptable JSON: it nests too deeply, is not UTF-8 or has an endless number"
    return JSONResponse(error_body(error.status_code, message).model_dump(), error.status_code, error.headers)


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    status, body = error_response(error)
    return JSONResponse(body.model_dump(), status)
