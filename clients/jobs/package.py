"""The upload of a training job: one zip of the `training` package, the configuration and the data files it names.

The configuration and the `training` folder are at the top level; data is under `data/`, and overrides name it there.
`training` imports nothing else of Corral, which `tests/repository/test_imports.py` enforces.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from itertools import chain, count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.config.data_config import DataSource
    from training.config.train_config import TrainConfig

MAX_PACKAGE_BYTES = 100 * 2**20  # Ray's limit for one request to the dashboard (DASHBOARD_CLIENT_MAX_SIZE)
_BLOCK = 1 << 20
_NOT_SENT = ("__pycache__", ".pyc")


@dataclass(frozen=True, slots=True)
class JobPackage:
    """The files of a job and the overrides that go with them.

    Attributes:
        files: path in the package -> local file.
        config_name: the configuration's path in the package.
        overrides: the user's, and those that name data in the package.
        remote_paths: absolute paths that are not on this machine and must exist on the cluster.
    """

    files: dict[str, Path]
    config_name: str
    overrides: list[str]
    remote_paths: list[str]

    def summary(self) -> str:
        """Kind, number and size of the files, in one line."""
        kinds = {"code": "training/", "data": "data"}
        parts = []
        for kind, prefix in kinds.items():
            sizes = [file.stat().st_size for name, file in self.files.items() if name.startswith(prefix)]
            parts.append(f"{len(sizes)} {kind} file{'' if len(sizes) == 1 else 's'} ({format_size(sum(sizes))})")
        return f"{self.config_name}, {', '.join(parts)}"

    def data_sha256(self) -> str:
        """One hash over names and contents of the data files."""
        digest = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            if name.startswith("data"):
                with file.open("rb") as content:
                    digest.update(name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def write(self, target: Path) -> int:
        """Write the zip and return its size in bytes. The same files give the same bytes, so Ray uploads them once.

        Raises:
            ConfigError: it exceeds Ray's limit; the message names the largest file.
        """
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)  # dated 1980
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as packed, file.open("rb") as content:
                    while block := content.read(_BLOCK):
                        packed.write(block)
                        if target.stat().st_size > MAX_PACKAGE_BYTES:
                            raise self._too_large()
        return target.stat().st_size

    def _too_large(self) -> ConfigError:
        largest = max(self.files.values(), key=lambda file: file.stat().st_size)
        return ConfigError(
            f"the job exceeds Ray's upload limit of {format_size(MAX_PACKAGE_BYTES)}; its largest file is "
            f"{str(largest)!r} ({format_size(largest.stat().st_size)}): put it where every node can read it, on a "
            "shared disk or the hub, and name it there in data.path"
        )


def pack(config_path: Path, overrides: list[str], config: "TrainConfig") -> JobPackage:
    """Collect the files of a job for `config`, which was read from `config_path` and `overrides`.

    Raises:
        CorralError: a path is valid on this machine only, or does not exist.
    """
    import training

    _check_paths(config)
    root = Path(str(training.__file__)).parent
    code = [file for file in sorted(root.rglob("*")) if file.is_file() and not str(file).endswith(_NOT_SENT)]
    files = {f"training/{file.relative_to(root).as_posix()}": file for file in code}
    files[config_path.name] = config_path
    remote_paths: list[str] = []
    data_overrides: dict[str, str] = {}
    for key, sources in (("data.path", config.data.path), ("data.held_out_path", config.data.held_out_path)):
        packed_sources = [_add_source(source, files, remote_paths) for source in sources]
        if packed_sources != sources:
            data_overrides[key] = f"{key}={_as_yaml(packed_sources)}"
    other_overrides = [text for text in overrides if text.partition("=")[0].strip() not in data_overrides]
    return JobPackage(files, config_path.name, [*other_overrides, *data_overrides.values()], remote_paths)


def format_size(num_bytes: float) -> str:
    """A human-readable size, such as 1.3 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _check_paths(config: "TrainConfig") -> None:
    base, storage = Path(config.base_model).expanduser(), config.storage_path
    if base.is_dir() and not base.is_absolute():
        raise ConfigError(
            f"base_model is {config.base_model!r}, a folder on this machine, and weights are not sent: give a hub id, "
            "or the absolute path of a folder that every node of the cluster can read"
        )
    if storage and "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage_path is {storage!r}, which on the cluster would be deleted with the job's working directory: "
            "give an absolute path that every node can reach, or an address such as s3://bucket/runs"
        )


def _add_source(source: "DataSource", files: dict[str, Path], remote_paths: list[str]) -> "DataSource":
    """Add a source's files to `files`; returns the source with its path in the package."""
    from training.config.data_config import GLOB_CHARS
    from training.data.sources import source_files

    path = Path(source.path).expanduser()
    if path.is_absolute() and not path.exists() and not GLOB_CHARS & set(source.path):
        remote_paths.append(source.path)
        return source
    local_files = source_files(source.path)
    if not local_files:  # a hub id
        return source
    path = Path(os.path.abspath(path))
    # A file or folder keeps its name, a glob its part from the first wildcard on.
    folder = path.parent if path.exists() else Path(*takewhile(lambda part: not GLOB_CHARS & set(part), path.parts))
    names = {file: Path(os.path.abspath(file)).relative_to(folder).as_posix() for file in local_files}
    top = next(
        top
        for top in chain(("data",), (f"data-{number}" for number in count(2)))
        if all(files.get(f"{top}/{name}", file) == file for file, name in names.items())
    )
    files.update({f"{top}/{name}": file for file, name in names.items()})
    return source.model_copy(update={"path": f"{top}/{path.relative_to(folder).as_posix()}"})


def _as_yaml(sources: "list[DataSource]") -> str:
    """Sources in the shortest form that `data.path` accepts; JSON is YAML."""
    values: list[Any] = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
    values = [value["path"] if value.keys() == {"path"} else value for value in values]
    return str(values[0]) if len(values) == 1 and isinstance(values[0], str) else json.dumps(values)
