"""A Ray of this machine alone, which ends with the driver and leaves the cores to the steps of training.

`training.ray_train.fit` starts it where there is no cluster. What a Ray does beside training is a few percent of two
cores.
"""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from training.local_ray.cpu_priority import low_priority

# Every process of this Ray inherits them; what the user has set stays.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # 15 by default: any other program would take the cores from training
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # watches for nodes that leave
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # new log files are looked for twice, not ten times a second
    "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "5",  # not 0.4
    "RAY_raylet_check_gc_period_milliseconds": "2000",  # not 100: nothing large is in its object store
    "RAY_kill_idle_workers_interval_ms": "2000",  # not 200
}


def start(**options: Any) -> None:
    """`ray.init` with its `options`; the processes of this Ray stand back behind the threads of a step."""
    import ray

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ask_for_a_token()
    with low_priority():
        ray.init(address="local", include_dashboard=False, **options)


def ask_for_a_token() -> None:
    """Have the next local Ray refuse callers without the token in ~/.ray/auth_token, made here if it is not there."""
    os.environ.pop("RAY_AUTH_MODE", None)  # then a new local Ray turns tokens on
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # a home that cannot be written to: Ray says so
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(token, "x", opener=_owner_only) as file:
            file.write(secrets.token_hex(32))  # 256 bits, as Ray's own
        token.chmod(0o600)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
