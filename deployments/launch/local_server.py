"""A serve YAML on a private Ray of this machine: what `corral serve` and `corral demo` do.

Starts Ray, starts Serve, deploys the applications as `serve deploy` would, waits until a token can be generated,
and takes everything down again. On a cluster, `serve deploy` does the deploying and this module has no part.
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
from deployments.launch.serve_ray import private_ray
from deployments.launch.tls import context_trusting
from deployments.listen_address import Frontend

_START_TIMEOUT_S = 900.0  # a 70B model loads for minutes
_POLL_S = 0.3
_PROGRAMS = {"corral", "clients.cli"}  # of `corral` and `python -m clients.cli`


@dataclass(frozen=True, slots=True)
class Server:
    """Where a running server answers; `certfile` is what an https URL is verified by."""

    url: str
    ui_url: str | None
    certfile: str | None = None

    @property
    def docs_url(self) -> str:
        """The API's interactive documentation."""
        return f"{self.url}/docs"


@contextlib.contextmanager
def serving(content: dict[str, Any], *, debug: bool = False, temp_dir: str | None = None) -> Iterator[Server]:
    """Serve what `deployments.config.load_serve_config` returned for as long as the block lasts.

    Args:
        content: a checked serve YAML.
        debug: show Ray's own log.
        temp_dir: Ray's session directory, for tests that keep apart; default: Ray's own.

    Raises:
        ServeError: the port is taken, or an application does not start.
    """
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(content)
    options = schema.http_options
    frontend = Frontend(options.host, options.port, options.ssl_certfile, options.ssl_keyfile)
    check_port(frontend.host, frontend.port)
    with private_ray(frontend, debug, temp_dir) as haproxy_answers:
        from ray import serve
        from ray.serve.context import _get_global_client

        http_options = options.model_dump()
        if haproxy_answers:  # Ray's own servers are behind it, on this machine only
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
                serve.delete(application.name, _blocking=True)  # answers in flight end first


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def check_port(host: str, port: int) -> None:
    """Refuse a port in use before anything long begins.

    Raises:
        ServeError: another program listens there.
    """
    if not port_is_free(host, port):
        raise ServeError(
            f"port {port} on {host} is in use by {listener_on(port)}: stop it, or choose another port with --port"
        )


def listener_on(port: int) -> str:
    """Who listens on a TCP port of this machine, as far as this user may know."""
    import psutil

    try:
        listening = [
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        ]
        process = next(psutil.Process(pid) for pid in listening if pid is not None)
        for ancestor in (process, *process.parents()):  # of HAProxy, the corral that started it
            if _PROGRAMS & {Path(word).name for word in ancestor.cmdline()[:3]}:
                return f"another corral (pid {ancestor.pid})"
        return f"{process.name()} (pid {process.pid})"
    except (psutil.Error, StopIteration):
        return "a program of another user"


def _reachable(host: str) -> str:
    """What this machine's clients write in a URL for a server that listens on `host`."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address


def _wait_until_ready(server: Server) -> None:
    from ray import serve

    urls = [f"{server.url}/readyz", *([server.ui_url] if server.ui_url else [])]
    verify = context_trusting(server.certfile) if server.certfile else True
    deadline = time.monotonic() + _START_TIMEOUT_S
    # A proxy of the environment does not reach our loopback.
    browser = {"accept": "text/html"}  # which is shown a login where the page needs one
    with httpx.Client(verify=verify, headers=browser, timeout=20, follow_redirects=True, trust_env=False) as http:
        while time.monotonic() < deadline:
            for name, application in serve.status().applications.items():
                if application.status == "DEPLOY_FAILED":
                    broken = [d.message for d in application.deployments.values() if d.message] or [application.message]
                    raise ServeError(f"application {name!r} does not start: {_last_line(broken[0])}")
            with contextlib.suppress(httpx.HTTPError):
                if all(http.get(url).status_code == 200 for url in urls):
                    return
            time.sleep(_POLL_S)
    raise ServeError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s: see `corral serve --debug`")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message; run again with --debug"
