"""The Ray of a run: a running cluster, or a private one on this machine that ends with the run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from training.errors import TrainingError
from training.local_ray.signals import preserved_handlers, signals_ignored
from training.local_ray.start import start_local_ray
from training.runs.run_dir import RunDir


@contextlib.contextmanager
def ray_session(on_cluster: bool, debug: bool) -> Iterator[bool]:
    """Ray for the block: one that this process has initialized, the cluster of RAY_ADDRESS, or a private one that ends
    with the block; yields whether it is private."""
    import logging

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns about a future default
    import ray

    if is_ray_initialized():
        yield False
        return
    quiet: dict[str, Any] = {} if debug else {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with preserved_handlers():
            if on_cluster:
                ray.init(**quiet)
            else:
                start_local_ray(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if on_cluster:
            problem = f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r} cannot be reached"
        else:
            problem = "Ray cannot be started on this machine"
        raise TrainingError(f"{problem}: {one_line(error)}") from error
    try:
        yield not on_cluster
    finally:
        with signals_ignored():
            ray.shutdown()


def is_ray_initialized() -> bool:
    """Whether this process is connected to Ray already; does not import ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def ray_storage(run_dir: RunDir) -> tuple[Any, str]:
    """The parent of the run directory for Ray Train: None and a path, or a pyarrow filesystem and a path in it."""
    if run_dir.is_local:
        return None, run_dir.parent
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(run_dir.parent)
    return PyFileSystem(FSSpecHandler(filesystem)), path


def equal_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """Resources per worker: the most CPUs that `num_workers` can have each on the current nodes, and a GPU if used."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        nodes = [ray.available_resources().get("CPU", 0.0)]  # a server may be using some
    shares = range(int(max(nodes, default=1.0)), 1, -1)
    cpus = next((share for share in shares if sum(cpu // share for cpu in nodes) >= num_workers), 1)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})


def one_line(error: BaseException) -> str:
    """The last line of the error's text, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
