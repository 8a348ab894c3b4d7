"""The dashboard of a Ray cluster: its address, its token, and Ray's own client for it.

Knows nothing about training.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from training.errors import ConfigError, CorralError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_DASHBOARD = "http://127.0.0.1:8265"
_TIMEOUT_S = 30.0
_UNAUTHORIZED = (401, 403)
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


class JobError(CorralError):
    """A cluster cannot be reached or used, or a job did not succeed."""


def dashboard_url(address: str) -> str:
    """Normalize the address of a dashboard; `auto` means the one in Ray's own variables, else this machine's.

    Raises:
        ConfigError: it is not an HTTP address.
    """
    if address == "auto":
        address = os.environ.get(_ADDRESS_VARIABLE) or os.environ.get("RAY_DASHBOARD_ADDRESS") or _DASHBOARD
    url = address if "://" in address else f"http://{address}"
    parts = httpx.URL(url)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"{address!r} is not the address of a dashboard: use http://HOST:8265 or 'auto'")
    if "://" not in address and parts.port is None:
        parts = parts.copy_with(port=8265)
    return str(parts).rstrip("/")


def _authorization(url: str) -> dict[str, str]:
    """The header with Ray's token, if the cluster requires one. Raises JobError if no dashboard answers."""
    status = _version_status(url, {})
    if status not in _UNAUTHORIZED:
        return {}
    token, source = _token()
    if not token:
        raise JobError(f"{url} requires a token: set RAY_AUTH_TOKEN, or write the cluster's token to ~/.ray/auth_token")
    headers = {"Authorization": f"Bearer {token}"}
    if _version_status(url, headers) in _UNAUTHORIZED:
        raise JobError(f"{url} rejects the token from {source}: use the current token of this cluster")
    return headers


def _version_status(url: str, headers: dict[str, str]) -> int:
    try:
        return httpx.get(f"{url}/api/version", headers=headers, timeout=_TIMEOUT_S).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise JobError(
            f"no Ray dashboard answers at {url} ({' '.join(str(error).split()) or type(error).__name__}): "
            "check host and port (8265, not the 6379 of ray.init) and that the cluster runs"
        ) from error


def _token() -> tuple[str, str]:
    """Ray's token and its source, in Ray's own order of precedence."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def connect(url: str) -> "JobSubmissionClient":
    """Ray's client for the dashboard at `url`, with its token if it requires one.

    Raises:
        JobError: nothing answers there, the token is missing or rejected, or Ray is not installed.
    """
    headers = _authorization(url)
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise JobError("submitting needs Ray on this machine: pip install 'llama-corral[platform]'") from error
    for module in ("dashboard_sdk", "job.sdk"):  # Corral prints its own progress
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    with _address_variable(url):
        return JobSubmissionClient(url, headers=headers)


@contextlib.contextmanager
def _address_variable(url: str) -> Iterator[None]:
    """Set Ray's address variable to `url`: it takes precedence over the address that Ray's client is given."""
    previous = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = url
    try:
        yield
    finally:
        if previous is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = previous
