"""Serves a serve YAML on a private Ray instance of this machine.

Starts Ray and Serve, deploys the applications as `serve deploy` would, waits until a token can be generated, and shuts
everything down again. Not used on a cluster, where `serve deploy` deploys the applications.
"""

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deployments.errors import ServeError
from deployments.launch.serve_ray import start_serve_ray
from deployments.launch.tls import context_trusting
from deployments.listen_address import Frontend

_START_TIMEOUT_S = 900.0  # a 70B model loads for minutes
_POLL_S = 0.3
_PROGRAMS = {"corral", "clients.cli"}  # as in `corral` and `python -m clients.cli`


@dataclass(frozen=True, slots=True)
class Server:
    """The addresses of a running server; an https URL is verified with `certfile`."""

    url: str
    ui_url: str | None
    certfile: str | None = None

    @property
    def docs_url(self) -> str:
        """The API's interactive documentation."""
        return f"{self.url}/docs"


@contextlib.contextmanager
def serving(content: dict[str, Any], *, debug: bool = False, temp_dir: str | None = None) -> Iterator[Server]:
    """Serve the result of `deployments.config.load_serve_config` for the duration of the block.

    Args:
        content: a checked serve YAML.
        debug: whether to show Ray's own log.
        temp_dir: Ray's session directory, to isolate tests; default: Ray's own.

    Raises:
        ServeError: the port is in use, or an application fails to start.
    """
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(content)
    options = schema.http_options
    frontend = Frontend(options.host, options.port, options.ssl_certfile, options.ssl_keyfile)
    check_port(frontend.host, frontend.port)
    with start_serve_ray(frontend, debug, temp_dir) as haproxy_answers:
        from ray import serve
        from ray.serve.context import _get_global_client

        http_options = options.model_dump()
        if haproxy_answers:  # Ray's own servers are behind it, on the loopback interface only
            http_options |= {"host": "127.0.0.1", "ssl_certfile": None, "ssl_keyfile": None}
        serve.start(proxy_location=schema.proxy_location, http_options=http_options)
        client: Any = _get_global_client()
        client.deploy_apps(schema)
        prefixes = {app.import_path: (app.route_prefix or "/").rstrip("/") for app in schema.applications}
        root = f"{'https' if frontend.certfile else 'http'}://{_reachable(frontend.host)}:{frontend.port}"
        ui = prefixes.get("deployments.app:build_ui")
        server = Server(
            root + prefixes.get("deployments.app:build_app", ""), None if ui is None else root + ui, frontend.certfile
        )
        try:
            _wait_until_ready(server)
            yield server
        finally:
            for application in schema.applications:
                serve.delete(application.name, _blocking=True)  # answers in flight finish first


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def check_port(host: str, port: int) -> None:
    """Reject a port in use before anything slow starts.

    Raises:
        ServeError: another program listens on the port.
    """
    if not port_is_free(host, port):
        raise ServeError(
            f"port {port} on {host} is in use by {listener_on(port)}: stop it, or choose another port with --port"
        )


def listener_on(port: int) -> str:
    """Describe the program that listens on a TCP port of this machine, as far as this user may see it."""
    import psutil

    try:
        pids = [c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        process = next(psutil.Process(pid) for pid in pids if pid is not None)
        for ancestor in (process, *process.parents()):  # for HAProxy, report the corral that started it
            if _PROGRAMS & {Path(word).name for word in ancestor.cmdline()[:3]}:
                return f"another corral (pid {ancestor.pid})"
        return f"{process.name()} (pid {process.pid})"
    except (psutil.Error, StopIteration):
        return "a program of another user"


def _reachable(host: str) -> str:
    """The host in the URL of this machine's clients, for a server that listens on `host`."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address


def _wait_until_ready(server: Server) -> None:
    from ray import serve

    urls = [f"{server.url}/readyz", *([server.ui_url] if server.ui_url else [])]
    verify = context_trusting(server.certfile) if server.certfile else True
    deadline = time.monotonic() + _START_TIMEOUT_S
    # No trust_env, because a proxy from the environment cannot reach the loopback interface.
    headers = {"accept": "text/html"}  # as a browser: redirected to the login if the page requires one
    with httpx.Client(verify=verify, headers=headers, timeout=20, follow_redirects=True, trust_env=False) as http:
        while time.monotonic() < deadline:
            for name, application in serve.status().applications.items():
                if application.status == "DEPLOY_FAILED":
                    messages = [d.message for d in application.deployments.values() if d.message]
                    message = messages[0] if messages else application.message
                    raise ServeError(f"application {name!r} failed to start: {_last_line(message)}")
            with contextlib.suppress(httpx.HTTPError):
                if all(http.get(url).status_code == 200 for url in urls):
                    return
            time.sleep(_POLL_S)
    raise ServeError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s: run 'corral serve --debug' to see why")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message: run again with --debug"
