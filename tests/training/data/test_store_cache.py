"""Prepared rows are kept on disk: when they are used again, and when they go."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.repository.import_graph import import_graph, modules
from tests.training.data.conftest import Prepare, questions, questions_of, row, write
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import TrainConfig
from training.data import build_store, store_cache
from training.data.run_inputs import read_data
from training.errors import DatasetError
from training.home import corral_home


def test_rows_are_prepared_once_and_again_when_anything_changes(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_writes: list[int] = []
    real = build_store.read_into

    def counted(*args: Any, **options: Any) -> Any:
        store_writes.append(1)
        return real(*args, **options)

    monkeypatch.setattr(store_cache, "read_into", counted)
    path = write(tmp_path / "d.jsonl", *questions(20))
    prepare(path)
    prepare(path, held_out=0.2, seed=4, deduplicate=False)  # decided after reading
    prepare({"path": path, "weight": 3})
    assert len(store_writes) == 1
    for number, change in enumerate(
        ({"max_length": 199}, {"max_rows": 9}, {"format": "prompt_completion"}, {"on_too_long": "truncate"}), start=2
    ):
        prepare(path, **change)
        assert len(store_writes) == number
    stat = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("question 1", "question x"))  # same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time
    assert "question x" in questions_of(prepare(path))


@pytest.mark.promise("F5")
def test_rows_with_another_system_text_are_others(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *questions(20))
    lengths = []
    for default_system in ("none", "template", "Be brief.", "none"):
        values = {
            "base_model": str(tiny_base.path),
            "adapter": "a",
            "max_length": 200,
            "data": {"path": str(path), "held_out": 0},
        }
        config = TrainConfig.model_validate({**values, "chat": {"default_system": default_system}})
        lengths.append(read_data(config).report.num_train_tokens)
    assert lengths[0] == lengths[3] < lengths[2] < lengths[1]


def test_the_cache_knows_every_module_that_makes_a_store() -> None:
    """A changed rendering, hash or format must not reuse the rows of the old one."""
    graph = import_graph()
    makers, pending = set(), ["training.data.build_store"]
    while pending:
        module = pending.pop()
        makers.add(module)
        pending += [other for other in graph[module] if other not in makers]
    indifferent = {  # settings are in the key, the base by its tokenizer's files
        "training.config.data_config",
        "training.errors",
        "training.home",
        "training.base_models.embedded",
        "training.base_models.resolve",
    }
    assert {modules()[module] for module in makers - indifferent} <= set(store_cache.code_files())


def test_a_store_that_was_not_finished_is_not_used(prepare: Prepare, tmp_path: Path) -> None:
    """A writer that is killed leaves nothing that a later run takes for complete."""
    path = write(tmp_path / "d.jsonl", *questions(20), "bad")
    with pytest.raises(DatasetError):
        prepare(path)
    assert not [*(corral_home() / "cache" / "datasets").glob(".writing-*")]
    assert len(prepare(path, on_bad_row="skip").train) == 20


def test_stores_that_nobody_used_for_long_are_removed(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / "cache" / "datasets"

    def stores() -> set[Path]:
        return {path for path in cache.iterdir() if path.is_dir()}

    opened = prepare(write(tmp_path / "a.jsonl", *questions(20))).train
    [old] = stores()
    for path in (old, *old.iterdir()):
        os.utime(path, (0, time.time() - 40 * 86_400))
    prepare(write(tmp_path / "b.jsonl", *questions(21)))
    [remaining] = stores()
    assert remaining != old
    assert len(opened[0]["input_ids"]) > 0  # a process that has it open continues to read
    monkeypatch.setattr(store_cache, "_CACHE_BYTES", 1)
    prepare(write(tmp_path / "c.jsonl", *questions(22)))
    assert len(stores()) == 1
    assert remaining not in stores()


def test_a_disk_that_is_full_is_named(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file size limit of the process stands in for the disk's."""
    path = write(tmp_path / "d.jsonl", *questions(2000))
    script = (
        "import resource, signal, sys\n"
        "from training.config.train_config import TrainConfig\n"
        "from training.errors import DatasetError\n"
        "from training.data.run_inputs import read_data\n"
        "config = TrainConfig.model_validate({'adapter': 'a', 'data': {'path': sys.argv[1]}})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    read_data(config)\n"
        "except DatasetError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "cannot be prepared in" in result.stdout
    assert "set CORRAL_HOME to a larger disk" in result.stdout


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    """Twenty times the rows take at most a fifth more memory, rows and tokens being on disk."""

    def peak_mib(num_rows: int) -> float:
        path = tmp_path / f"{num_rows}.{suffix}"
        rows = [row(f"{index} " + "hum " * 60, f"answer {index} " * 20) for index in range(num_rows)]
        if suffix == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        else:
            write(path, *rows)
        script = (
            "import re, sys\n"
            "from training.config.train_config import TrainConfig\n"
            "from training.data.run_inputs import read_data\n"
            "data = {'path': sys.argv[1], 'held_out': 0.1}\n"
            "config = TrainConfig.model_validate({'adapter': 'a', 'data': data})\n"
            "prepared = read_data(config)\n"
            "assert len(prepared.train) + len(prepared.held_out) == int(sys.argv[2])\n"
            "order = range(0, len(prepared.train), 7)\n"
            "assert all(len(prepared.train[at]['input_ids']) > 100 for at in order)\n"
            # not ru_maxrss, which a child inherits from its parent
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)\n"
        )
        command = [sys.executable, "-c", script, str(path), str(num_rows)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few, many = peak_mib(500), peak_mib(10_000)
    assert many < few * 1.2, f"{few:.0f} MiB for 500 rows, {many:.0f} MiB for 10,000"


def test_workers_of_one_machine_prepare_once(tmp_path: Path) -> None:
    """Three processes that start at once end with one store, and with the same rows."""
    path = write(tmp_path / "d.jsonl", *questions(300))
    script = (
        "import hashlib, sys\n"
        "from training.config.train_config import TrainConfig\n"
        "from training.data.run_inputs import read_data\n"
        "config = TrainConfig.model_validate({'adapter': 'a', 'data': {'path': sys.argv[1]}})\n"
        "rows = read_data(config).train\n"
        "print(hashlib.sha256(repr([*rows]).encode()).hexdigest())\n"
    )
    stores = corral_home() / "cache" / "datasets"
    before = {entry for entry in stores.glob("*") if entry.is_dir()}
    command = [sys.executable, "-c", script, path]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {worker.communicate(timeout=300)[0] for worker in workers}
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65
    assert len({entry for entry in stores.glob("*") if entry.is_dir()} - before) == 1
