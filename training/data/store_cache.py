"""The row stores under CORRAL_HOME/cache/datasets: keyed by everything they depend on, written once, pruned."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from training.base_models.resolve import BaseCheckpoint
from training.chat.chat_format import ChatFormat
from training.config.data_config import DataConfig, RowKind
from training.data import sources
from training.data.build_store import read_into
from training.data.report import ReadFacts
from training.data.row_store import RowStore
from training.errors import DatasetError
from training.home import corral_home

_CACHE_BYTES = 20 << 30  # of all stores together; the least recently used are removed first
_CACHE_S = 30 * 86_400.0  # a store that was not used for this long is removed too
_WRITING = ".writing-"
_ABANDONED_S = 86_400.0  # since the last write to an unfinished store


def code_files() -> list[Path]:
    """The code that a store's content depends on: a change in any of these files invalidates all stores."""
    data, training = Path(__file__).parent, Path(__file__).parents[1]
    return sorted([*data.glob("*.py"), *(training / "chat").glob("*.py"), training / "base_models" / "tokenizer.py"])


def open_or_build_store(
    config: DataConfig, base: BaseCheckpoint, chat_format: ChatFormat, kind: RowKind, max_length: int
) -> tuple[RowStore, ReadFacts]:
    """Open the store of these rows; build it first if no process of this machine has done so.

    Raises:
        DatasetError: a source cannot be read, a row is not accepted, or the disk is full.
    """
    cache = corral_home() / "cache" / "datasets"
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / _key(config, base, chat_format, kind, max_length)
    with FileLock(f"{directory}.lock"):
        if not (directory / "facts.json").exists():
            _write_store(directory, config, chat_format, kind, max_length)
            _prune(cache, keep=directory)
        os.utime(directory)
        facts = ReadFacts.model_validate_json((directory / "facts.json").read_text())
        return RowStore(directory), facts


def _write_store(directory: Path, config: DataConfig, chat_format: ChatFormat, kind: RowKind, max_length: int) -> None:
    """Write to a temporary directory and rename it, so that a killed writer never leaves a partial store."""
    temporary = Path(tempfile.mkdtemp(prefix=_WRITING, dir=directory.parent))
    try:
        facts = read_into(temporary, config, chat_format, kind=kind, max_length=max_length)
        (temporary / "facts.json").write_text(facts.model_dump_json())
        temporary.rename(directory)
    except OSError as error:
        raise DatasetError(
            f"dataset {', '.join(config.paths)} cannot be prepared in {str(directory.parent)!r} "
            f"({error.strerror or error}): free some space, or set CORRAL_HOME to a larger disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _key(config: DataConfig, base: BaseCheckpoint, chat_format: ChatFormat, kind: RowKind, max_length: int) -> str:
    """A hash of everything that a store depends on, our own code included; seed, split and weights do not matter."""
    dependencies = [
        [[source.format, source.columns, source.split, sources.fingerprint(source)] for source in config.sources],
        [len(config.path), config.max_rows, config.on_too_long == "truncate", kind, max_length, chat_format.name],
        asdict(chat_format.default_system) if chat_format.default_system else None,
        [sources.sha256_of([file]) for file in code_files()],
        [
            sources.sha256_of([file])
            for name in ("tokenizer.json", "tokenizer_config.json")
            if (file := base.path / name).exists()
        ],
    ]
    return hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:32]


def _prune(cache: Path, keep: Path) -> None:
    """Remove stores that are old or exceed the size limit; processes that have one open can keep reading it."""
    total = _num_bytes(keep)
    others = [path for path in cache.iterdir() if path.is_dir() and path != keep]
    for path in sorted(others, key=_last_used, reverse=True):
        unused_s = time.time() - _last_used(path)
        if path.name.startswith(_WRITING):  # its writer may still be running
            if unused_s > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
            continue
        total += _num_bytes(path)
        if total > _CACHE_BYTES or unused_s > _CACHE_S:
            with contextlib.suppress(Timeout), FileLock(f"{path}.lock", timeout=0):
                shutil.rmtree(path, ignore_errors=True)


def _num_bytes(store: Path) -> int:
    return sum(file.stat().st_size for file in store.iterdir())


def _last_used(store: Path) -> float:
    return max(path.stat().st_mtime for path in (store, *store.iterdir()))
