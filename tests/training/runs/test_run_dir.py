"""A run's directory, on a disk and in an object store."""

from pathlib import Path

import pytest

from training.errors import TrainingError
from training.runs.metrics_log import MetricsLog
from training.runs.run_dir import RunDir


@pytest.fixture(params=["disk", "store"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    parent = str(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}"
    return RunDir(parent, "a-run")


def test_files_come_back_and_what_is_not_there_is_none(run_dir: RunDir) -> None:
    assert run_dir.read_json("result.json") is None
    run_dir.write_json("result.json", {"loss": 1.5})
    assert run_dir.read_json("result.json") == {"loss": 1.5}
    run_dir.write_text("result.json", '{"loss": 1.')
    assert run_dir.read_json("result.json") is None
    run_dir.remove("result.json", "never-there.json")
    assert run_dir.read_text("result.json") is None


def test_a_folder_goes_up_and_comes_back(run_dir: RunDir, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep" / "b.txt").write_text("b")
    run_dir.upload(source, "adapter")
    fetched = run_dir.fetch("adapter")
    assert (fetched / "a.txt").read_text() == "a"
    assert (fetched / "deep" / "b.txt").read_text() == "b"
    assert run_dir.is_local == fetched.is_relative_to(tmp_path / "a-run")


def test_the_newest_folders_are_kept(run_dir: RunDir) -> None:
    for name in ("checkpoint_1/a", "checkpoint_3/a", "checkpoint_2/a", "checkpoints.json", "adapter/a"):
        run_dir.write_text(name, "x")
    run_dir.keep_newest("checkpoint_", 2)
    names = ("checkpoint_1/a", "checkpoint_2/a", "checkpoint_3/a", "checkpoints.json", "adapter/a")
    assert [run_dir.read_text(name) for name in names] == [None, "x", "x", "x", "x"]


def test_metrics_of_steps_that_are_taken_again_are_dropped(run_dir: RunDir) -> None:
    run_dir.write_text("metrics.jsonl", '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(run_dir, 2)
    log.add({"step": 3, "loss": 0.5})
    log.flush()
    assert run_dir.read_text("metrics.jsonl") == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"run directory .*file/a-run: cannot write config.json"):
        RunDir(tmp_path / "file", "a-run").write_json("config.json", {})
    with pytest.raises(TrainingError, match="run directory 'nope://x/a-run' cannot be opened"):
        RunDir("nope://x", "a-run")
