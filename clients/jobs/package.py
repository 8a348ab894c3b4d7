"""What a training job is sent: one zip of the `training` package, the configuration and the data files it names.

`clients.jobs.jobs` uploads it. Inside, the configuration and the `training` folder are at the top, data lies under
`data/`, and overrides name it there. `training` imports nothing else of Corral, which
`tests/repository/test_imports.py` holds.
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

MAX_PACKAGE_BYTES = 100 * 2**20  # what Ray's dashboard takes in one request (DASHBOARD_CLIENT_MAX_SIZE)
_BLOCK = 1 << 20
_NOT_SENT = ("__pycache__", ".pyc")


@dataclass(frozen=True, slots=True)
class JobPackage:
    """The files of a job and how it is told to use them.

    Attributes:
        files: the name inside -> the file here.
        config_name: the configuration's name inside.
        overrides: the user's, and those that name data inside the package.
        elsewhere: absolute paths that are not on this machine; the cluster is to have them.
    """

    files: dict[str, Path]
    config_name: str
    overrides: list[str]
    elsewhere: list[str]

    def summary(self) -> str:
        """Kind, number and size of what is sent, one line."""
        kinds = {"code": "training/", "data": "data"}
        parts = []
        for kind, prefix in kinds.items():
            sizes = [file.stat().st_size for name, file in self.files.items() if name.startswith(prefix)]
            parts.append(f"{len(sizes)} {kind} file{'' if len(sizes) == 1 else 's'} ({readable(sum(sizes))})")
        return f"{self.config_name}, {', '.join(parts)}"

    def data_sha256(self) -> str:
        """One hash over names and contents of the data files."""
        total = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            if name.startswith("data"):
                with file.open("rb") as content:
                    total.update(name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
        return total.hexdigest()

    def write(self, target: Path) -> int:
        """Write the zip, the same bytes for the same files, so that Ray uploads it once; returns its size in bytes.

        Raises:
            ConfigError: it would be larger than Ray takes; names the largest file.
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
            f"what the job needs is more than the {readable(MAX_PACKAGE_BYTES)} that Ray takes, the largest file is "
            f"{str(largest)!r} with {readable(largest.stat().st_size)}: put it where every node sees it, on a shared "
            "disk or the hub, and name it there in data.path"
        )


def pack(config_path: Path, overrides: list[str], config: "TrainConfig") -> JobPackage:
    """Collect what a job for `config`, which was read from `config_path` and `overrides`, has to be sent.

    Raises:
        CorralError: a path means something on this machine only, or names nothing.
    """
    import training

    _check_paths(config)
    root = Path(str(training.__file__)).parent
    code = [file for file in sorted(root.rglob("*")) if file.is_file() and not str(file).endswith(_NOT_SENT)]
    files = {f"training/{file.relative_to(root).as_posix()}": file for file in code}
    files[config_path.name] = config_path
    elsewhere: list[str] = []
    moved: dict[str, str] = {}
    for key, sources in (("data.path", config.data.path), ("data.held_out_path", config.data.held_out_path)):
        inside = [_move(source, files, elsewhere) for source in sources]
        if inside != sources:
            moved[key] = f"{key}={_as_yaml(inside)}"
    kept = [override for override in overrides if override.partition("=")[0].strip() not in moved]
    return JobPackage(files, config_path.name, [*kept, *moved.values()], elsewhere)


def readable(num_bytes: float) -> str:
    """A size for people, such as 1.3 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _check_paths(config: "TrainConfig") -> None:
    base, storage = Path(config.base_model).expanduser(), config.storage_path
    if base.is_dir() and not base.is_absolute():
        raise ConfigError(
            f"base_model is {config.base_model!r}, a folder of this machine, and weights are not sent: name a hub id, "
            "or with its absolute path a folder that every node of the cluster sees"
        )
    if storage and "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage_path is {storage!r}, which on the cluster would be in the job's own folder and go with it: "
            "name an absolute path that every node sees, or an address such as s3://bucket/runs"
        )


def _move(source: "DataSource", files: dict[str, Path], elsewhere: list[str]) -> "DataSource":
    """Add a source's files to the package; returns the source as it is named inside."""
    from training.config.data_config import GLOB_CHARS
    from training.data.sources import source_files

    given = Path(source.path).expanduser()
    if given.is_absolute() and not given.exists() and not GLOB_CHARS & set(source.path):
        elsewhere.append(source.path)
        return source
    found = source_files(source.path)
    if not found:  # a hub id
        return source
    here = Path(os.path.abspath(given))
    # A file or folder keeps its name, a glob what is from its first wildcard on.
    folder = here.parent if here.exists() else Path(*takewhile(lambda part: not GLOB_CHARS & set(part), here.parts))
    names = {file: Path(os.path.abspath(file)).relative_to(folder).as_posix() for file in found}
    top = next(
        top
        for top in chain(("data",), (f"data-{number}" for number in count(2)))
        if all(files.get(f"{top}/{name}", file) == file for file, name in names.items())
    )
    files.update({f"{top}/{name}": file for file, name in names.items()})
    return source.model_copy(update={"path": f"{top}/{here.relative_to(folder).as_posix()}"})


def _as_yaml(sources: "list[DataSource]") -> str:
    """Sources in the shortest form that `data.path` accepts; JSON is YAML."""
    values: list[Any] = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
    values = [value["path"] if value.keys() == {"path"} else value for value in values]
    return str(values[0]) if len(values) == 1 and isinstance(values[0], str) else json.dumps(values)
