"""One attempt of a run on a worker: its scratch directory, and its failure recorded where the driver reads it."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from training.errors import CorralError, TrainingError
from training.runs.run_dir import RunDir


@contextlib.contextmanager
def scratch_of(run_dir: RunDir, rank: int) -> Iterator[Path]:
    """A folder of this worker's own, in the run's directory where that is on a disk: what a killed worker leaves goes
    with the next one.
    """
    local = run_dir.local_path(f"scratch/{rank}")
    if local is None:
        with tempfile.TemporaryDirectory(prefix="corral-") as scratch:
            yield Path(scratch)
        return
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir(parents=True)
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks are still there
            local.parent.rmdir()


@contextlib.contextmanager
def failure_recorded(run_dir: RunDir, rank: int) -> Iterator[None]:
    """Leave `failure.json` where the block ends with an error that would only come again (rank 0)."""
    try:
        with _full_disk_named(run_dir):
            yield
    except CorralError as error:
        if rank == 0:
            with contextlib.suppress(CorralError):  # a full disk has no room for it
                run_dir.write_json("failure.json", {"error": type(error).__name__, "message": str(error)})
        raise


@contextlib.contextmanager
def _full_disk_named(run_dir: RunDir) -> Iterator[None]:
    """Turn what libraries raise on a full disk into one line."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error):
            raise
        raise TrainingError(
            f"no space is left for run directory {run_dir}: free some and pass run_name={run_dir.name} to go on from "
            "its last checkpoint, or set storage_path"
        ) from error
