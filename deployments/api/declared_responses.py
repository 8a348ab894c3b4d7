"""The responses of each kind of route, as its documentation declares them."""

from typing import Any

from deployments.protocol.base import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is not valid; `param` names the field."},
    404: {"model": ErrorResponse, "description": "No such model, or no such stored item."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is of another type than JSON, or compressed otherwise."},
    429: {"model": ErrorResponse, "description": "A limit of the key is reached; `Retry-After` says how long to wait."},
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "Temporarily unavailable; try again."},
}
TOKENIZER_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 404, 413, 500)}
ADMIN_ERRORS: dict[int | str, dict[str, Any]] = TOKENIZER_ERRORS | {
    409: {"model": ErrorResponse, "description": "An alias or a canary prevents the change."}
}
COMPLETION_RESPONSES: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {"content": {"text/event-stream": {}}, "description": "The completion."}
}
STORED_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is not valid."},
    404: {"model": ErrorResponse, "description": "The caller has stored no such response."},
    500: ERRORS[500],
    503: ERRORS[503],
}
METRICS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."},
    503: ERRORS[503],
}
