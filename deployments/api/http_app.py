"""The FastAPI application of the ingress, before its routes are added: body limit, error responses, documentation.

Every error becomes an OpenAI error object. Ray Serve's proxy adds `x-request-id` to every response, and logs it.
"""

import logging
from typing import Annotated, Any

from fastapi import FastAPI, Header
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from deployments.api.docs_page import add_docs
from deployments.asgi import MAX_BODY_BYTES, BodyLimitMiddleware, HeadMiddleware, JsonBodyMiddleware, mount_prefix
from deployments.auth.dependencies import ChatCaller
from deployments.errors import RateLimited, error_body, error_response
from deployments.protocol.base import ErrorResponse
from training.errors import CorralError

_HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}

RequestId = Annotated[str | None, Header(alias="x-request-id", include_in_schema=False)]  # None without Ray's proxy

logger = logging.getLogger("ray.serve")


def create_api() -> FastAPI:
    """An application without routes other than those of its documentation."""
    api = FastAPI(
        title="Corral",
        description="Llama chat models and their adapters, OpenAI-compatible.",
        openapi_url=None,  # FastAPI's own documentation routes need no key
        # Also keeps FastAPI from documenting its own 422 response, which is never sent.
        responses={"default": {"model": ErrorResponse, "description": "Any other error."}},
    )
    api.add_api_route("/openapi.json", _openapi, include_in_schema=False)
    add_docs(api)
    api.add_exception_handler(CorralError, _corral_error_response)
    api.add_exception_handler(RequestValidationError, _validation_error_response)
    api.add_exception_handler(HTTPException, _http_exception_response)
    api.add_exception_handler(Exception, _unexpected_error_response)
    api.add_middleware(JsonBodyMiddleware)
    api.add_middleware(BodyLimitMiddleware, max_body_bytes=MAX_BODY_BYTES)
    api.add_middleware(HeadMiddleware)
    return api


async def _openapi(request: Request, caller: ChatCaller) -> JSONResponse:
    schema = request.app.openapi()
    servers = [{"url": mount_prefix(request)}] if mount_prefix(request) else []
    return JSONResponse({**schema, "servers": servers} if servers else schema)


async def _corral_error_response(_: Request, error: Exception) -> JSONResponse:
    status, body = error_response(error)
    headers = error.headers if isinstance(error, RateLimited) else _HEADERS.get(status)
    return JSONResponse(body.model_dump(), status, headers)


async def _validation_error_response(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        body = error_body(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    else:
        path = _field_path(first, error.body)
        for other in errors[1:]:  # of the members of a union that pydantic tried, the one that matched furthest
            other_path = _field_path(other, error.body)
            if len(other_path) > len(path) and other_path[: len(path)] == path:
                first, path = other, other_path
        param = ".".join(path) or None
        message = first["msg"].removeprefix("Value error, ")
        body = error_body(400, f"{param or 'the body'}: {message}", param)
    return JSONResponse(body.model_dump(), 400)


def _field_path(error: dict[str, Any], body: Any) -> list[str]:
    """Path of the error in the body, without the names of union members that pydantic puts between."""
    place, *parts = error["loc"]
    if place != "body" or body is None:
        return [str(part) for part in parts]
    path = []
    for index, part in enumerate(parts):
        in_body = isinstance(body, dict) and part in body
        in_body |= isinstance(body, list) and isinstance(part, int) and part < len(body)
        is_missing = error["type"] in ("missing", "needed") and index == len(parts) - 1 and isinstance(body, dict)
        if in_body or is_missing:
            path.append(str(part))
        if in_body:
            body = body[part]
    return path


async def _http_exception_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 405:
        methods = _methods(request, headers.get("Allow", headers.get("allow", "")))
        headers = {"allow": ", ".join(methods)}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        message = f"{request.method} is not allowed here: send one of {headers['allow']}"
    elif error.status_code == 404:
        message = _unknown_route(request)
    elif message == "There was an error parsing the body":  # FastAPI's text when its JSON parser raises
        message = "the body cannot be parsed as JSON: it is nested too deeply, is not UTF-8 or has too long a number"
    return JSONResponse(error_body(error.status_code, message).model_dump(), error.status_code, headers)


def _methods(request: Request, of_one_route: str) -> list[str]:
    """The methods of all routes of a path; Starlette names those of one route."""
    path = request.url.path.removeprefix(mount_prefix(request))
    routes = request.app.openapi()["paths"]  # made once
    matching = [operations for template, operations in routes.items() if compile_path(template)[0].match(path)]
    named = {*of_one_route.split(", "), *(method.upper() for operations in matching for method in operations)}
    methods = sorted((named | {"OPTIONS"}) - {"", "HEAD"})
    return [*methods, "HEAD"] if "GET" in methods else methods


def _unknown_route(request: Request) -> str:
    prefix = mount_prefix(request)
    path = request.url.path.removeprefix(prefix)
    routes = request.app.openapi()["paths"]  # made once
    parts = [part for part in path.split("/") if part and part != "v1"]
    for candidate in (f"/v1/{'/'.join(parts)}", f"/{'/'.join(parts)}"):
        if candidate in routes and candidate != path:
            return f"there is no {path:.80}: the route is {prefix}{candidate}, so a base URL ends in {prefix}/v1"
    return f"there is no {path:.80}: the routes are listed at {prefix}/docs, and a base URL ends in {prefix}/v1"


async def _unexpected_error_response(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    status, body = error_response(error)
    return JSONResponse(body.model_dump(), status)
