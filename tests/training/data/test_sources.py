"""Raw rows of every kind of file, folder, glob and hub dataset."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.config.data_config import DataConfig, DataSource
from training.data import sources
from training.data.sources import fingerprint, hub_rows, read_rows, source_files
from training.errors import DatasetError

ROWS = [{"prompt": "q1", "completion": "a1"}, {"prompt": "q2, ü", "completion": 'a "2"\nand more'}]


def contents(path: Path | str) -> list[Any]:
    rows = [*read_rows(DataSource(path=str(path)))]
    return [json.loads(row.content) if isinstance(row.content, bytes) else row.content for row in rows]


def places(path: Path | str) -> list[str]:
    return [row.location.removeprefix(str(path)) for row in read_rows(DataSource(path=str(path)))]


def as_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = 'prompt,completion\nq1,a1\n"q2, ü","a ""2""\nand more"\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", as_lines(ROWS)),
        ("d.json", json.dumps(ROWS)),
        ("d.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("d.json", as_lines(ROWS)),
        ("d.json", "\ufeff\n" + json.dumps(ROWS)),
        ("d.csv", CSV),
        ("d.csv", "\ufeff prompt , completion \r\n\r\nq1,a1\r\n" + CSV.partition("q1,a1\n")[2]),
        ("d.csv", 'prompt;completion\nq1;a1\n"q2, ü";"a ""2""\nand more"\n'),
        ("d.csv", ',prompt,completion\n0,q1,a1\n1,"q2, ü","a ""2""\nand more"\n'),
        ("d.tsv", 'prompt\tcompletion\nq1\ta1\nq2, ü\t"a ""2""\nand more"\n'),
        ("D.CSV", CSV),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_every_kind_of_text_file_has_the_same_rows(tmp_path: Path, name: str, content: str, compress: bool) -> None:
    path = tmp_path / (name + ".gz" if compress else name)
    path.write_bytes(gzip.compress(content.encode()) if compress else content.encode())
    assert contents(path) == ROWS


def test_zstandard_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "d.csv.zst"
    path.write_bytes(pa.compress(CSV.encode(), codec="zstd", asbytes=True))
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(CSV.encode())
    assert contents(path) == ROWS


def test_parquet_rows_are_read_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}], "n": n} for n in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    assert contents(path) == rows
    assert places(path)[::699] == [":row 1", ":row 700"]


def test_rows_are_named_by_the_line_they_begin_in(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\n"two\nlines",a\n\n , \nq,a\n')
    assert places(path) == [":2", ":6"]
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert places(path) == [":2", ":4"]
    path = tmp_path / "d.json"
    path.write_text('[\n{"a": 1},\n{"a": 2}]')
    assert places(path) == [":row 1", ":row 2"]


def test_a_json_file_with_a_single_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    (tmp_path / "d.json").write_text(json.dumps(row, indent=1))
    assert contents(tmp_path / "d.json") == [row]


def test_folders_and_globs_are_read_in_order_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "set/b.jsonl",
        "set/a.csv",
        "set/deep/c.jsonl",
        "set/README.md",
        "set/.hidden.jsonl",
        "set/_tmp/d.csv",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(CSV if name.endswith("csv") else as_lines(ROWS))
    assert [*map(str, source_files("set"))] == ["set/a.csv", "set/b.jsonl", "set/deep/c.jsonl"]
    assert [*map(str, source_files("set/**/*.jsonl"))] == ["set/b.jsonl", "set/deep/c.jsonl"]
    assert [*map(str, source_files("set/[ab].*"))] == ["set/a.csv", "set/b.jsonl"]
    assert [row.location for row in read_rows(DataSource(path="set"))][::2] == [
        "set/a.csv:2",
        *(f"set/{name}.jsonl:1" for name in ("b", "deep/c")),
    ]
    assert source_files("owner/name") == []  # a hub id
    Path("empty").mkdir()
    for nothing in ("empty", "set/*.parquet", "set/README.md"):
        with pytest.raises(DatasetError, match=r"supported .*type: supported are .jsonl, .json, .csv"):
            source_files(nothing)


@pytest.mark.promise("B10")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.csv", b"", "has no header: name the columns in its first line"),
        ("d.csv", b"prompt,prompt\nq,a\n", "has two columns named 'prompt'"),
        ("d.csv", b'prompt,completion\nq,a\nq,"never closed\n', "d.csv:3: not valid CSV"),
        ("d.csv", "prompt,completion\nq,\u00fc\n".encode("latin-1"), "not UTF-8 from here on: save the file as"),
        ("d.json", b'[{"a": 1},', "is not valid JSON"),
        ("d.json", b'"text"', "expected an array of rows, or an object with one such array, got a str"),
        ("d.json", b'{"train": [], "test": []}', "one such array, got an object with the lists train, test"),
        ("d.json", b'{"a": 1}', "one such array, got an object without a list"),
        ("d.parquet", b"no parquet", "cannot be read"),
        ("d.jsonl.gz", b"no gzip", "cannot be read"),
        ("d.txt", b"\xff", "is not valid UTF-8"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """P B10."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as exc_info:
        contents(tmp_path / name)
    assert reason in str(exc_info.value)
    assert str(tmp_path / name) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.promise("B10")
def test_a_csv_row_with_other_cells_than_the_header_is_bad(tmp_path: Path) -> None:
    """P B10."""
    (tmp_path / "d.csv").write_text("prompt,completion\nq,a,b\nq\nq,a\n")
    rows = [*read_rows(DataSource(path=str(tmp_path / "d.csv")))]
    assert [row.problem for row in rows] == [
        "3 cells, but the header has 2",
        "1 cells, but the header has 2",
        None,
    ]


def test_a_large_json_array_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_JSON_BYTES", 20)
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    with pytest.raises(DatasetError, match=r"too large to parse at once: write one row per line to a \.jsonl file"):
        contents(tmp_path / "d.json")


def test_rows_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` streams a directory named like a hub id as it streams the hub's copy."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(as_lines(ROWS))
    rows = [*hub_rows(DataSource(path="owner/name"))]
    assert [row.content for row in rows] == ROWS
    assert [row.location for row in rows] == ["owner/name:row 1", "owner/name:row 2"]
    assert not [*(tmp_path / "cache").rglob("*.arrow")]  # streamed, not copied
    with pytest.raises(DatasetError, match="hub dataset 'owner/name', split 'validation' cannot be loaded"):
        next(hub_rows(DataSource(path="owner/name", split="validation")))


def test_a_configuration_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    for name, content in (("short", ROWS[:1]), ("whole", ROWS)):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(as_lines(content))
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("short", "whole"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    [source] = DataConfig(path="owner/name", name="whole").sources
    assert [row.content for row in hub_rows(source)] == ROWS
    with pytest.raises(
        DatasetError, match=r"'owner/name', split 'train' cannot be loaded .*'short'.*check data.path, "
    ):
        next(hub_rows(DataSource(path="owner/name", split="train")))


def test_a_revision_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its rows is identified by the commit of the requested revision."""
    import huggingface_hub.constants

    commits = {"/api/datasets/owner/name": "a" * 40, "/api/datasets/owner/name/revision/v2": "b" * 40}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "owner/name", "sha": commits[self.path]}).encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        fingerprints = [fingerprint(DataSource(path="owner/name", revision=revision))[-1] for revision in (None, "v2")]
        hub.shutdown()
    assert fingerprints == ["a" * 40, "b" * 40]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match=r"hub dataset 'owner/name' cannot be loaded .*or use a local file"):
        fingerprint(DataSource(path="owner/name"))


def test_fingerprints_of_large_files_are_cheap_and_change_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_HASHED_BYTES", 4)
    monkeypatch.setattr(sources, "sha256_of", lambda files: pytest.fail("read whole"))
    path = tmp_path / "d.jsonl"
    source = DataSource(path=str(path))
    path.write_text("one row")
    before = fingerprint(source)
    assert fingerprint(source) == before
    path.write_text("another row")
    after = fingerprint(source)
    assert after != before
    path.unlink()
    path.write_text("another row")
    assert fingerprint(source) != after
