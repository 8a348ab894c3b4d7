"""The directory of one run, on a disk or in an object store: everything that a run writes, during and after training.

    config.json      the resolved configuration      drivers/          processes that held its lock: run_lock.py
    data.json        the data report                 progress.json     what it is doing now
    metrics.jsonl    one line per logged step        result.json       metrics and samples, at the end
    failure.json     why it failed                   adapter/          the trained adapter
    parent/          the adapter it started from     environment.json  libraries and devices of worker 0
    plan.json        the plan before training        registered.json   the registered version, or why it was refused
    phases.json      when each phase started         trackers.json     which trackers failed
    tensorboard/     event files                     report.md         the report, with its plots
    checkpoint_*/    Ray Train's checkpoints

Writes are atomic: readers see a complete file or none. Knows nothing of Ray.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.home import corral_home
from training.storage import TEMPORARY_PREFIX, Storage


def runs_address(storage_path: str | None = None) -> str:
    """Where run directories are: `storage_path`, a path or an fsspec address, by default CORRAL_HOME/runs."""
    if not storage_path:
        return str(corral_home() / "runs")
    if "://" in storage_path:
        return storage_path.rstrip("/")
    return str(Path(os.path.expanduser(storage_path)).absolute())


class RunDir:
    """`parent`/`name`, where `parent` is a directory or any fsspec address; the first write creates it.

    Every method raises TrainingError if the disk or store fails.
    """

    def __init__(self, parent: str | Path, name: str) -> None:
        self.parent, self.name = str(parent).rstrip("/"), name
        self.address = f"{self.parent}/{name}"
        self._storage = Storage(self.address, "run directory", TrainingError)

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk of this machine, or one mounted here."""
        return self._storage.local_path("") is not None

    def read_text(self, file: str) -> str | None:
        """The file's text; None if it does not exist."""
        content = self._storage.read_if_there(file)
        return None if content is None else content.decode()

    def write_text(self, file: str, text: str) -> None:
        """Write or replace the file, atomically."""
        with self._storage.guard(f"write {file}"):
            self._storage.write(file, text.encode())

    def read_json(self, file: str) -> Any:
        """The file's content; None if it does not exist or is not JSON."""
        try:
            return json.loads(self.read_text(file) or "null")
        except ValueError:
            return None

    def write_json(self, file: str, value: Any) -> None:
        """Write or replace the file with `value` as JSON, atomically."""
        self.write_text(file, json.dumps(value, indent=1))

    def create_json(self, file: str, value: Any) -> bool:
        """Create the file with `value`; False if it exists. Of several concurrent callers, one gets True."""
        with self._storage.guard(f"write {file}"):
            return self._storage.create(file, json.dumps(value, indent=1).encode())

    def files(self, folder: str) -> list[str]:
        """Paths of all complete files in `folder`, sorted, such as `folder/name`."""
        with self._storage.guard(f"list {folder}"):
            paths = self._storage.find(folder)  # s3fs lists the folder itself if it is created during the call
        return [file for file in paths if file.startswith(f"{folder}/") and TEMPORARY_PREFIX not in file]

    def append(self, file: str, line: str) -> None:
        """Append a line to a file; not possible in an object store."""
        path = self._storage.local_path(file)
        assert path is not None, f"{self.address} is an object store"
        with self._storage.guard(f"write {file}"), path.open("a") as lines:
            lines.write(line + "\n")

    def remove(self, *files: str) -> None:
        """Remove the files that exist."""
        with self._storage.guard(f"remove {', '.join(files)}"):
            for file in files:
                self._storage.remove(file)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that no process writes to any more."""
        if local := self._storage.local_path(folder):
            shutil.rmtree(local, ignore_errors=True)
            return
        with self._storage.guard(f"remove {folder}"):
            self._storage.remove_folder(folder)

    def keep_newest(self, prefix: str, number: int) -> None:
        """Remove all folders whose name starts with `prefix`, except the last `number` by name."""
        with self._storage.guard(f"remove old {prefix}*"):
            folders = {file.split("/")[0] for file in self._storage.find() if "/" in file and file.startswith(prefix)}
            for folder in sorted(folders)[:-number]:
                self._storage.remove_folder(folder)

    def upload(self, source: Path, file: str) -> None:
        """Copy a local file, or all files in a local folder, to `file`."""
        with self._storage.guard(f"write {file}"):
            if source.is_file():
                self._storage.upload(source, file)
                return
            for part in sorted(path for path in source.rglob("*") if path.is_file()):
                self._storage.upload(part, f"{file}/{part.relative_to(source)}")

    def fetch(self, folder: str, copy: Path | None = None) -> Path:
        """A directory on this machine with the folder's files.

        On a disk that is the folder itself; from an object store a new copy at `copy`, by default in CORRAL_HOME.
        """
        local = self._storage.local_path(folder)
        if local is not None:
            return local
        key = hashlib.sha256(f"{self.address}/{folder}".encode()).hexdigest()[:16]
        copy = copy or corral_home() / "cache" / "runs" / key
        shutil.rmtree(copy, ignore_errors=True)
        with self._storage.guard(f"read {folder}"):
            for file in self._storage.find(folder):
                target = copy / Path(file).relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._storage.download(file, target)
        return copy

    def local_path(self, file: str = "") -> Path | None:
        """The file's path on this machine's disk; None in an object store."""
        return self._storage.local_path(file)

    def __str__(self) -> str:
        return self.address
