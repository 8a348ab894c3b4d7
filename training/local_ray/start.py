"""A private Ray on this machine, which ends with the driver and yields the CPU to the training threads.

Its own work takes a few percent of two cores.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from training.errors import CorralError
from training.local_ray.cpu_priority import low_priority

# Inherited by every process of this Ray; variables that are already set are kept.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # 15 by default: any other program would take CPU time from training
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it watches for nodes that leave
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # look for new log files twice, not ten times a second
    "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "5",  # 0.4 by default
    "RAY_raylet_check_gc_period_milliseconds": "2000",  # 100 by default; its object store has nothing large
    "RAY_kill_idle_workers_interval_ms": "2000",  # 200 by default
}

_STARTUP_TIMEOUT = "timed out during startup"  # in the message of ray._private.node
_MAX_STARTS = 3


def start_local_ray(**options: Any) -> None:
    """`ray.init` with `options`; the processes of this Ray run at low priority (see `cpu_priority`)."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    require_token()
    with low_priority():
        init_ray(**options)


def init_ray(**options: Any) -> None:
    """`ray.init` for a Ray on this machine only, started again if a busy machine exceeds Ray's fixed limit of 30 s.

    Raises:
        CorralError: it exceeded the limit three times.
    """
    import ray

    for _ in range(_MAX_STARTS):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            ray.shutdown()
            if _STARTUP_TIMEOUT not in str(error):
                raise
    raise CorralError(
        f"Ray did not start on this machine, tried {_MAX_STARTS} times for 30 s: other programs take all of its CPU "
        "time; stop some of them and try again"
    )


def require_token() -> None:
    """Make the next local Ray require the token in ~/.ray/auth_token, which is created if it does not exist."""
    os.environ.pop("RAY_AUTH_MODE", None)  # if it is unset, a new local Ray requires tokens
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # the home is not writable: Ray reports it
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(token, "x", opener=_owner_only) as file:
            file.write(secrets.token_hex(32))  # 256 bits, as in Ray's own tokens
        token.chmod(0o600)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
