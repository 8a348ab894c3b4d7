"""The errors of the serving side and the one map from errors to status codes.

CorralError                        (training.errors; each message is written for who can mend it)
├── ChatFormatError       400
├── AdapterNotFound       404      model_not_found
├── RegistryConflict      409      registry_conflict
├── AdapterRefused        500      adapter_unhealthy
└── ServeError
    ├── ServeConfigError           a serve YAML that is not accepted; never crosses HTTP
    ├── CertificateError           a certificate that cannot be made or read; never crosses HTTP
    ├── ContextLengthExceeded 400  context_length_exceeded
    ├── ResponseFormatRefused 400
    ├── InvalidKey        401      invalid_api_key
    ├── MissingScope      403      missing_scope
    ├── OriginRefused     403      origin_refused
    ├── ModelNotFound     404      model_not_found
    ├── BodyTooLarge      413
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
    """A failure on the serving side; `param` is the request's field it is about."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type["ServeError"], tuple[Any, ...]]:
        return type(self), (str(self), self.param)


class ServeConfigError(ServeError):
    """A serve YAML that is not accepted."""


class CertificateError(ServeError):
    """A certificate that cannot be made or read."""


class ContextLengthExceeded(ServeError):
    """Prompt and answer do not fit the context."""


class ResponseFormatRefused(ServeError):
    """An answer cannot be held to this `response_format`."""


class InvalidKey(ServeError):
    """No key, or one that is not accepted."""


class MissingScope(ServeError):
    """The key may not do this."""


class OriginRefused(ServeError):
    """Without keys a server answers programs of its own machine only, and no pages of other hosts."""


class ModelNotFound(ServeError):
    """`model` names nothing that is served here."""


class BodyTooLarge(ServeError):
    """The request body is over the limit."""


class RateLimited(ServeError):
    """The key's limits have no room for the request now; `headers` say when, where time mends it."""

    def __init__(self, message: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.headers = headers

    def __reduce__(self) -> tuple[type["RateLimited"], tuple[Any, ...]]:
        return type(self), (str(self), self.headers)


class EngineFault(ServeError):
    """The engine could not finish an answer."""


class KeysUnreadable(ServeError):
    """The file of keys is broken, so nobody can be let in."""


class NotReady(ServeError):
    """Something that the request needs is not there now: a model replica, the ledger."""


_STATUS: list[tuple[type[CorralError], int, str | None]] = [
    (ChatFormatError, 400, None),
    (ContextLengthExceeded, 400, "context_length_exceeded"),
    (ResponseFormatRefused, 400, None),
    (InvalidKey, 401, "invalid_api_key"),
    (MissingScope, 403, "missing_scope"),
    (OriginRefused, 403, "origin_refused"),
    (ModelNotFound, 404, "model_not_found"),
    (AdapterNotFound, 404, "model_not_found"),
    (RegistryConflict, 409, "registry_conflict"),
    (BodyTooLarge, 413, "body_too_large"),
    (RateLimited, 429, "rate_limit_exceeded"),
    (AdapterRefused, 500, "adapter_unhealthy"),
    (RegistryError, 500, "registry_error"),
    (EngineFault, 500, "engine_error"),
    (KeysUnreadable, 500, "keys_unreadable"),
    (NotReady, 503, "not_ready"),
]


def error_response(error: Exception) -> tuple[int, ErrorResponse]:
    """Status code and body for any error; what is not ours says nothing about its insides."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return status, error_body(status, str(error), _param(error), code)
    return 500, error_body(
        500, "internal error: the server's log has the cause under this x-request-id", None, "internal"
    )


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorResponse:
    """OpenAI's error object."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def _param(error: CorralError) -> str | None:
    if isinstance(error, ServeError):
        return error.param
    if isinstance(error, ChatFormatError):
        return "messages" if error.message_index is None else f"messages.{error.message_index}"
    return None
