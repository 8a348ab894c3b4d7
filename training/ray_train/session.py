"""The Ray that a run uses: a cluster that already runs, or one of this machine alone that ends with the run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from training.errors import TrainingError
from training.local_ray import start as private_ray
from training.local_ray.signals import kept_handlers, undisturbed
from training.runs.run_dir import RunDir


@contextlib.contextmanager
def ray_session(on_cluster: bool, debug: bool) -> Iterator[bool]:
    """Ray for the block: the cluster of RAY_ADDRESS, one that the caller started, or a private one that ends here;
    yields whether it is the last."""
    import logging

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns about its own future
    import ray

    if ray_is_running_here():
        yield False
        return
    quiet: dict[str, Any] = {} if debug else {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with kept_handlers():
            if on_cluster:
                ray.init(**quiet)
            else:
                private_ray.start(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}" if on_cluster else "Ray on this machine"
        raise TrainingError(f"{where} cannot be reached: {one_line(error)}") from error
    try:
        yield not on_cluster
    finally:
        with undisturbed():
            ray.shutdown()


def ray_is_running_here() -> bool:
    """Whether the caller has connected this program to Ray already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def ray_storage(run_dir: RunDir) -> tuple[Any, str]:
    """The run directory's parent as Ray Train takes it: None and a path, or a pyarrow filesystem and a path in it."""
    if run_dir.is_local:
        return None, run_dir.parent
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(run_dir.parent)
    return PyFileSystem(FSSpecHandler(filesystem)), path


def equal_share(num_workers: int, use_gpu: bool) -> dict[str, float]:
    """The most CPUs that each of `num_workers` can have at once on the nodes there are; and a GPU where used."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        nodes = [ray.available_resources().get("CPU", 0.0)]  # a server may run beside
    shares = range(int(max(nodes, default=1.0)), 1, -1)
    cpus = next((share for share in shares if sum(cpu // share for cpu in nodes) >= num_workers), 1)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
