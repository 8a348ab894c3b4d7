"""One attempt of a run on a worker: its scratch directory, and the record of its failure in the run's directory."""

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
    """A scratch directory for this worker, inside the run's directory if that is on a disk.

    Whatever a killed worker leaves in it is removed by the next attempt.
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
        with contextlib.suppress(OSError):  # other ranks still use theirs
            local.parent.rmdir()


@contextlib.contextmanager
def failure_recorded(run_dir: RunDir, rank: int) -> Iterator[None]:
    """Write `failure.json` if the block raises an error that a retry would only repeat (rank 0 only)."""
    try:
        with _full_disk_error(run_dir):
            yield
    except CorralError as error:
        if rank == 0:
            with contextlib.suppress(CorralError):  # the disk may be full
                run_dir.write_json("failure.json", {"error": type(error).__name__, "message": str(error)})
        raise


@contextlib.contextmanager
def _full_disk_error(run_dir: RunDir) -> Iterator[None]:
    """Turn what libraries raise on a full disk into one line."""
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and "No space left" not in str(error):
            raise
        raise TrainingError(
            f"no space is left for run directory {run_dir}: free some and pass run_name={run_dir.name} to resume from "
            "its last checkpoint, or set storage_path"
        ) from error
