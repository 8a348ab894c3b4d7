"""The directory of one run, on a disk or in an object store: what a run leaves, and what is read back while it runs.

    config.json      the resolved configuration      drivers/        who drives it and drove it: run_lock.py
    data.json        what was found in the data      progress.json   what it is doing now
    metrics.jsonl    one line per logged step        result.json     figures and samples, at the end
    failure.json     why it failed                   adapter/        the trained adapter, parent/ what it started from
    plan.json        what it was going to do         environment.json  libraries and devices of worker 0
    phases.json      when each of its phases began   registered.json what became of the adapter
    tensorboard/     event files                     trackers.json   which trackers failed
    checkpoint_*/    Ray Train's checkpoints         report.md       for people, with its pictures

Driver and workers write here, `corral runs` reads. Each file is there whole or not at all. Knows no Ray.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.home import corral_home
from training.storage import TEMPORARY_PREFIX, Storage


class RunDir:
    """`parent`/`name`, where `parent` is a directory or any fsspec address; made by the first write.

    Every method raises TrainingError when the disk or store fails.
    """

    def __init__(self, parent: str | Path, name: str) -> None:
        self.parent, self.name = str(parent).rstrip("/"), name
        self.address = f"{self.parent}/{name}"
        self._storage = Storage(self.address, "run directory", TrainingError)

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk that this machine sees."""
        return self._storage.local_path("") is not None

    def read_text(self, file: str) -> str | None:
        """The file's text; None if it is not there."""
        content = self._storage.read_if_there(file)
        return None if content is None else content.decode()

    def write_text(self, file: str, text: str) -> None:
        """Put `text` in place of the file, at once."""
        with self._storage.guard(f"write {file}"):
            self._storage.write(file, text.encode())

    def read_json(self, file: str) -> Any:
        """The file's content; None if it is not there or is not JSON."""
        try:
            return json.loads(self.read_text(file) or "null")
        except ValueError:
            return None

    def write_json(self, file: str, value: Any) -> None:
        """Put `value` in place of the file, at once."""
        self.write_text(file, json.dumps(value, indent=1))

    def create_json(self, file: str, value: Any) -> bool:
        """Make the file with `value`; False if it is there. One caller of many gets True."""
        with self._storage.guard(f"write {file}"):
            return self._storage.create(file, json.dumps(value, indent=1).encode())

    def files(self, folder: str) -> list[str]:
        """Names of all whole files in `folder`, sorted, with it before them."""
        with self._storage.guard(f"list {folder}"):
            found = self._storage.find(folder)  # of a folder that appears meanwhile s3fs finds the folder itself
        return [file for file in found if file.startswith(f"{folder}/") and TEMPORARY_PREFIX not in file]

    def append(self, file: str, line: str) -> None:
        """Add a line to a file on a disk; an object store cannot."""
        path = self._storage.local_path(file)
        assert path is not None, f"{self.address} is an object store"
        with self._storage.guard(f"write {file}"), path.open("a") as lines:
            lines.write(line + "\n")

    def remove(self, *files: str) -> None:
        """Remove those of the files that are there."""
        with self._storage.guard(f"remove {', '.join(files)}"):
            for file in files:
                self._storage.remove(file)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that nobody writes to any more."""
        if local := self._storage.local_path(folder):
            shutil.rmtree(local, ignore_errors=True)
            return
        with self._storage.guard(f"remove {folder}"):
            self._storage.remove_folder(folder)

    def keep_newest(self, prefix: str, number: int) -> None:
        """Remove all folders whose name begins with `prefix` but the last `number` by name."""
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
        """A directory on this machine with the folder's files: its own, or a fresh `copy`, else one in CORRAL_HOME."""
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
        """Where a file is on this machine's disk; None in an object store."""
        return self._storage.local_path(file)

    def __str__(self) -> str:
        return self.address
