"""The exceptions of the serving side, and the single mapping from exceptions to status codes.

CorralError                        (training.errors; each message tells its reader what to do)
├── ChatFormatError       400
├── AdapterNotFound       404      model_not_found
├── RegistryConflict      409      registry_conflict
├── AdapterRefused        500      adapter_unhealthy
└── ServeError
    ├── ServeConfigError           a serve YAML that is not accepted; never sent over HTTP
    ├── CertificateError           a certificate that cannot be created or read; never sent over HTTP
    ├── ContextLengthExceeded 400  context_length_exceeded
    ├── ResponseFormatRefused 400
    ├── InputRefused      400
    ├── NotCancellable    400
    ├── PreviousResponseNotFound 400  previous_response_not_found
    ├── InvalidKey        401      invalid_api_key
    ├── MissingScope      403      missing_scope
    ├── OriginRefused     403      origin_refused
    ├── ModelNotFound     404      model_not_found
    ├── ResponseNotFound  404
    ├── BodyTooLarge      413
    ├── UnsupportedBody   415
    ├── RateLimited       429      rate_limit_exceeded
    ├── EngineFault       500      engine_error
    ├── KeysUnreadable    500      keys_unreadable
    └── NotReady          503      not_ready
"""

from typing import Any

from deployments.protocol.base import ErrorDetail, ErrorResponse
from training.errors import (
    AdapterNotFound,
    AdapterRefused,
    ChatFormatError,
    CorralError,
    RegistryConflict,
    RegistryError,
)


class ServeError(CorralError):
    """A failure on the serving side; `param` is the field of the request that caused it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type["ServeError"], tuple[Any, ...]]:
        return type(self), (str(self), self.param)


class ServeConfigError(ServeError):
    """A serve YAML that is not accepted."""


class CertificateError(ServeError):
    """A certificate that cannot be created or read."""


class ContextLengthExceeded(ServeError):
    """Prompt and answer do not fit the context."""


class ResponseFormatRefused(ServeError):
    """An answer cannot be constrained to this `response_format`."""


class InputRefused(ServeError):
    """A response's `input`, or what comes before it, cannot be rendered."""


class NotCancellable(ServeError):
    """A response that is complete, as all stored responses are, cannot be cancelled."""


class PreviousResponseNotFound(ServeError):
    """The caller has stored no response with the id `previous_response_id`."""


class ResponseNotFound(ServeError):
    """The caller has stored no response, or no item of one, with this id."""


class InvalidKey(ServeError):
    """The API key is missing or not accepted."""


class MissingScope(ServeError):
    """The API key lacks the scope for this route."""


class OriginRefused(ServeError):
    """A server without API keys serves only programs of its own machine, and no web pages of other hosts."""


class ModelNotFound(ServeError):
    """`model` is not the name of a model that this server serves."""


class BodyTooLarge(ServeError):
    """The request body exceeds the limit."""


class UnsupportedBody(ServeError):
    """The body is encoded in a way, or is of a type, that is not read."""


class RateLimited(ServeError):
    """The request exceeds a limit of its API key; `headers` say when to retry, if waiting helps."""

    def __init__(self, message: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.headers = headers

    def __reduce__(self) -> tuple[type["RateLimited"], tuple[Any, ...]]:
        return type(self), (str(self), self.headers)


class EngineFault(ServeError):
    """The engine could not finish an answer."""


class KeysUnreadable(ServeError):
    """The file of API keys is unusable, so no request can be authenticated."""


class NotReady(ServeError):
    """A component that the request needs is unavailable: a model replica, the ledger or the grammar compiler."""


_STATUS: list[tuple[type[CorralError], int, str | None]] = [
    (ChatFormatError, 400, None),
    (ContextLengthExceeded, 400, "context_length_exceeded"),
    (ResponseFormatRefused, 400, None),
    (InputRefused, 400, None),
    (NotCancellable, 400, None),
    (PreviousResponseNotFound, 400, "previous_response_not_found"),
    (InvalidKey, 401, "invalid_api_key"),
    (MissingScope, 403, "missing_scope"),
    (OriginRefused, 403, "origin_refused"),
    (ModelNotFound, 404, "model_not_found"),
    (AdapterNotFound, 404, "model_not_found"),
    (ResponseNotFound, 404, None),
    (RegistryConflict, 409, "registry_conflict"),
    (BodyTooLarge, 413, "body_too_large"),
    (UnsupportedBody, 415, "unsupported_body"),
    (RateLimited, 429, "rate_limit_exceeded"),
    (AdapterRefused, 500, "adapter_unhealthy"),
    (RegistryError, 500, "registry_error"),
    (EngineFault, 500, "engine_error"),
    (KeysUnreadable, 500, "keys_unreadable"),
    (NotReady, 503, "not_ready"),
]


def error_response(error: Exception) -> tuple[int, ErrorResponse]:
    """Status code and body for any exception; those that are not Corral's reveal no details."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return status, error_body(status, str(error), _param(error), code)
    return 500, error_body(
        500, "internal error: the server's log has the cause under this x-request-id", None, "internal"
    )


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorResponse:
    """An error in OpenAI's format."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def _param(error: CorralError) -> str | None:
    if isinstance(error, ServeError):
        return error.param
    if isinstance(error, ChatFormatError):
        return "messages" if error.message_index is None else f"messages.{error.message_index}"
    return None
