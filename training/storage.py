"""Atomic file operations under one root, on a local disk or an object store.

A reader never sees a partially written file. On a local disk, writing is a temporary file, fsync and a rename; on an
object store (any fsspec filesystem) a put is atomic anyway, and only `exclusive` has no counterpart. Knows nothing of
what the files contain. Paths are relative to the root and use `/`.
"""

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from training.errors import CorralError, RegistryError

TEMPORARY_PREFIX = ".tmp-"

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_LOCK_TIMEOUT_S = 30


class Storage:
    """The files under `root`, a path or any fsspec address such as `s3://bucket/registry`.

    Args:
        label: what error messages call the root.
        error_type: raised if the root cannot be opened, and by `guard`.
    """

    def __init__(
        self, root: str | Path, label: str = "registry", error_type: type[CorralError] = RegistryError
    ) -> None:
        self.address, self._label, self._error_type = str(root), label, error_type
        try:
            self._fs, path = fsspec.core.url_to_fs(os.path.expanduser(self.address))
        except (ImportError, ValueError) as error:
            raise error_type(f"{label} {self.address!r} cannot be opened: {_one_line(error)}") from error
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._root: str = os.path.abspath(path) if self._is_local else path.rstrip("/")

    @contextmanager
    def guard(self, action: str) -> Iterator[None]:
        """Turn a disk or network error during `action` into a one-line `error_type`."""
        try:
            yield
        except CorralError:
            raise
        except OSError as error:
            advice = "check that the path is correct and reachable"
            if error.errno in _NO_SPACE:
                advice = "free some space or set CORRAL_HOME to a larger disk"
            elif error.errno in _READ_ONLY or isinstance(error, PermissionError):
                advice = f"it is read-only for this user: grant write access or use another {self._label}"
            raise self._error_type(
                f"{self._label} {self.address}: cannot {action}: {error.strerror or _one_line(error)}: {advice}"
            ) from error
        except Exception as error:
            if self._is_local:
                raise
            # Object store clients raise their own exceptions (no credentials, no such endpoint).
            raise self._error_type(f"{self._label} {self.address}: cannot {action}: {_one_line(error)}") from error

    def local_path(self, path: str) -> Path | None:
        """The file's path on a local disk; None on an object store."""
        return Path(self._at(path)) if self._is_local else None

    def find(self, path: str = "") -> list[str]:
        """All files at or below `path`, sorted; empty if it does not exist."""
        if self._is_local:
            return sorted(_walk(self._at(path), f"{path}/" if path else ""))
        self._fs.invalidate_cache()
        start = len(self._root) + 1
        return sorted(file[start:] for file in self._fs.find(self._at(path)))

    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._at(path)))

    def read(self, path: str) -> bytes:
        """The file's bytes; raises FileNotFoundError if it does not exist."""
        data: bytes = self._fs.cat_file(self._at(path))
        return data

    def read_if_there(self, path: str) -> bytes | None:
        """The file's bytes, or None if it does not exist; other errors are those of `guard`."""
        with self.guard(f"read {path}"):
            try:
                return self.read(path)
            except FileNotFoundError:
                return None

    def age_s(self, path: str) -> float:
        """Seconds since the file was written."""
        if self._is_local:
            return time.time() - os.stat(self._at(path)).st_mtime
        return time.time() - float(self._fs.modified(self._at(path)).timestamp())

    def create(self, path: str, data: bytes = b"") -> bool:
        """Create a file with `data`; False if it exists. Of several concurrent callers, exactly one gets True."""
        try:
            if self._is_local:
                with self._replacing(path, put=_rename_if_new) as file:
                    file.write(data)
            else:
                self._fs.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file atomically."""
        with self._replacing(path) as file:
            file.write(data)

    def upload(self, source: Path, path: str) -> str:
        """Copy a local file to `path`; returns the sha256 of the copied bytes."""
        digest = hashlib.sha256()
        with source.open("rb") as original, self._replacing(path) as copy:
            while block := original.read(1 << 20):
                digest.update(block)
                copy.write(block)
        return digest.hexdigest()

    def download(self, path: str, target: Path) -> None:
        with self._fs.open(self._at(path), "rb") as remote, target.open("wb") as local:
            shutil.copyfileobj(remote, local, 1 << 20)

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def remove_folder(self, path: str) -> None:
        """Remove a folder that is no longer written to."""
        for file in self.find(path):
            self.remove(file)
        if self._is_local:
            with suppress(OSError):  # not empty, or removed already
                os.rmdir(self._at(path))

    def exclusive(self, path: str) -> AbstractContextManager[Any]:
        """A lock against other writers on this disk; on an object store there is none, and the last writer wins."""
        if not self._is_local:
            return nullcontext()
        from filelock import FileLock

        self._make_parent(path)
        return FileLock(self._at(path), timeout=_LOCK_TIMEOUT_S)

    @contextmanager
    def _replacing(self, path: str, put: Callable[[str, str], None] = os.replace) -> Iterator[Any]:
        if not self._is_local:
            with self._fs.open(self._at(path), "wb") as file:
                yield file
            return
        target = self._at(path)
        self._make_parent(path)
        temporary = os.path.join(os.path.dirname(target), f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            put(temporary, target)
        finally:
            with suppress(OSError):  # renamed already
                os.unlink(temporary)
        _sync_directory(os.path.dirname(target))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _make_parent(self, path: str) -> None:
        os.makedirs(os.path.dirname(self._at(path)), exist_ok=True)


def _walk(directory: str, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            children = list(entries)
    except FileNotFoundError:
        return
    for entry in children:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}"


def _rename_if_new(source: str, target: str) -> None:
    """Rename, but raise FileExistsError if `target` exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system; the target is empty for a moment
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.replace(source, target)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
