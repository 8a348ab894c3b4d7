"""A data source -> its raw rows, one at a time: files, folders, globs and hub datasets.

Reads JSONL, JSON, CSV, TSV, Parquet and plain text, compressed or not, and streams all but JSON arrays. Knows no
dataset format: what a row means is decided in `training.data.formats`.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.config.data_config import COLUMNS, GLOB_CHARS, DataSource
from training.errors import DatasetError

_COMPRESSED = (".gz", ".zst", ".bz2")
_MAX_JSON_BYTES = 1 << 30  # a JSON array is parsed whole
_MAX_CELL_CHARS = 1 << 26  # of a CSV cell; the library's own limit is 131,072
_PARQUET_BATCH_ROWS = 256
_HASHED_WHOLE_BYTES = 64 << 20
_EXCERPT_CHARS = 80
_ERROR_CHARS = 300  # of what a library says on several lines
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before anything is known of it.

    Attributes:
        location: `file.jsonl:12` with the line, or `file.parquet:row 12` where there are no lines; both count from 1.
        content: JSON text as bytes, or what a reader made of the row, mostly a dict.
        problem: why the reader could not make sense of it.
    """

    location: str
    content: Any
    problem: str | None = None

    @property
    def excerpt(self) -> str:
        """The row's first characters."""
        if isinstance(self.content, bytes):
            return self.content[: 4 * _EXCERPT_CHARS].decode("utf-8", errors="replace")[:_EXCERPT_CHARS]
        return json.dumps(self.content, ensure_ascii=False, default=str)[:_EXCERPT_CHARS]


def read_rows(source: DataSource) -> Iterator[RawRow]:
    """Every row of a source in order, blank lines left out.

    Raises:
        DatasetError: there is no such source, or a file in it cannot be read.
    """
    files = source_files(source.path)
    if not files:
        yield from hub_rows(source)
    for file in files:
        try:
            yield from _READERS[_suffix(file)](file)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise DatasetError(f"dataset {str(file)!r} cannot be read ({reason}): check data.path") from error


def source_files(path: str) -> list[Path]:
    """The files behind a path, in order of their names; none where it is a hub dataset id.

    Raises:
        DatasetError: nothing is there, or nothing that can be read.
    """
    here = Path(path).expanduser()
    if here.is_file():
        if _suffix(here) not in _READERS:
            raise DatasetError(f"dataset {path!r} is no file that can be read: {_ACCEPTED_FILES}")
        return [here]
    if here.is_dir():
        found = [file for file in sorted(here.rglob("*")) if _is_data(file, here)]
    elif GLOB_CHARS & set(path):
        matches = map(Path, sorted(glob.glob(str(here), recursive=True)))
        found = [file for file in matches if file.is_file() and _suffix(file) in _READERS]
    elif _suffix(here) not in _READERS and _HUB_ID.fullmatch(path):
        return []
    else:
        raise DatasetError(
            f"dataset {path!r} is no file, folder or glob (in {Path.cwd()}) and no hub dataset id like 'owner/name': "
            "check data.path"
        )
    if not found:
        raise DatasetError(f"dataset {path!r} holds no file that can be read: {_ACCEPTED_FILES}")
    return found


def fingerprint(source: DataSource) -> list[Any]:
    """What changes whenever the rows of a source do; cheap for large files.

    A small file is hashed whole, as it can be written twice within one tick of the file system's clock. A large one
    is told by path, size, inode, and the times of its last change, of which ctime cannot be set. A hub dataset is
    told by its commit.
    """
    files = source_files(source.path)
    if not files:
        return [source.path, source.name, source.split, _hub_commit(source)]
    told: list[Any] = []
    for file in files:
        stat = file.stat()
        if stat.st_size <= _HASHED_WHOLE_BYTES:
            told.append([str(file), sha256_of([file])])
        else:
            stamp = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            told.append([str(file.absolute()), *stamp])
    return told


def sha256_of(files: list[Path]) -> str:
    """Of the bytes of all files in order; for a single one it is what `sha256sum` prints."""
    total = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    total.update(block)
        except OSError as error:
            raise DatasetError(f"dataset {str(file)!r} cannot be read ({error.strerror}): check data.path") from error
    return total.hexdigest()


def hub_rows(source: DataSource) -> Iterator[RawRow]:
    """The rows of a hub dataset, streamed: nothing but the row at hand is in memory."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    asked = {"name": source.name, "split": source.split or "train", "revision": source.revision}
    try:
        for number, row in enumerate(load_dataset(source.path, **asked, streaming=True), start=1):
            yield RawRow(f"{source.path}:row {number}", row)
    except (OSError, ValueError, DatasetsError) as error:
        raise _hub_error(source, error) from error


def _hub_commit(source: DataSource) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(source.path, revision=source.revision).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _hub_error(source, error) from error
    except Exception as error:  # the HTTP client's own errors, of whatever library it is
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests"):
            raise _hub_error(source, error) from error
        raise


def _hub_error(source: DataSource, error: Exception) -> DatasetError:
    told = " ".join(str(error).split())[:_ERROR_CHARS]
    asked = {"name": source.name, "split": source.split, "revision": source.revision}
    named = "".join(f", {key} {value!r}" for key, value in asked.items() if value)
    return DatasetError(
        f"hub dataset {source.path!r}{named} cannot be loaded ({told}): check data.path, data.name, data.split "
        "and data.revision, or name a file or folder here"
    )


def _suffix(file: Path) -> str:
    name = file.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and _suffix(file) in _READERS


def _open(file: Path) -> io.BufferedReader:
    if file.suffix.lower() in _COMPRESSED:
        stream: Any = pa.input_stream(str(file), compression="detect")
        return io.BufferedReader(stream)
    return file.open("rb")


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if content := line.strip():
                yield RawRow(f"{file}:{number}", content)


def _json_rows(file: Path) -> Iterator[RawRow]:
    """An array of rows, an object with one list of rows, or, as many files named .json are, one row per line."""
    with _open(file) as lines:
        filled = (line for line in lines if line.strip())
        first, second = next(filled, b""), next(filled, None)
    if second is not None and _is_json_object(first):
        yield from _jsonl_rows(file)
        return
    with _open(file) as content:
        whole = content.read(_MAX_JSON_BYTES + 1)
    if len(whole) > _MAX_JSON_BYTES:
        raise DatasetError(
            f"dataset {str(file)!r} is a JSON array of more than 1 GiB, which is parsed whole: write one row per line "
            "to a .jsonl file, for example with jq -c '.[]'"
        )
    try:
        value = json.loads(whole.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DatasetError(f"dataset {str(file)!r} is not JSON ({error}): {_ACCEPTED_FILES}") from error
    for number, row in enumerate(_rows_in(value, file), start=1):
        yield RawRow(f"{file}:row {number}", row)


def _rows_in(value: Any, file: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if value.keys() & set(COLUMNS):
            return [value]
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if len(lists) == 1:
            return next(iter(lists.values()))
        found = f"an object with the lists {', '.join(lists)}" if lists else "an object without a list of rows"
    else:
        found = f"a {type(value).__name__}"
    raise DatasetError(f"dataset {str(file)!r} is {found}: expected an array of rows, or an object with one such array")


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _csv_rows(file: Path) -> Iterator[RawRow]:
    """A header and rows; the delimiter is the likeliest of , ; tab and | in the header. A column without name is left
    out: it is the index that pandas writes."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    line = 1
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            delimiter = "\t" if _suffix(file) == ".tsv" else max(",;\t|", key=first.count)
            reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, file)
            line = reader.line_num + 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    row = {name: cell for name, cell in zip(header, cells, strict=False) if name}
                    wrong = len(cells) != len(header)
                    problem = f"has {len(cells)} cells, the header has {len(header)}" if wrong else None
                    yield RawRow(f"{file}:{line}", row, problem)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DatasetError(f"{file}:{line}: not UTF-8 from here on: save the file as 'CSV UTF-8'") from error
        except csv.Error as error:
            raise DatasetError(f"{file}:{line}: not CSV ({error}): check the quotes of that row") from error


def _check_header(header: list[str], file: Path) -> None:
    names = [name for name in header if name]
    if not names:
        raise DatasetError(f"dataset {str(file)!r} has no header: name the columns in its first line")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"dataset {str(file)!r} names the column {twice[0]!r} twice: rename one of them")


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    number = 0
    with pq.ParquetFile(str(file)) as parquet:
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{file}:row {number}", row)


def _text_rows(file: Path) -> Iterator[RawRow]:
    """The whole file is one text."""
    with _open(file) as content:
        try:
            yield RawRow(f"{file}:1", {"text": content.read().decode("utf-8-sig")})
        except UnicodeDecodeError as error:
            raise DatasetError(f"dataset {str(file)!r} is not UTF-8: convert it first") from error


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
_ACCEPTED_FILES = f"accepted are {', '.join(_READERS)}, each also with {', '.join(_COMPRESSED)} after it"
