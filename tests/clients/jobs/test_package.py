"""The package of a job: everything that training needs, data under the package's names, and nothing else."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clients.jobs.package import JobPackage, pack
from training.config.load import load_config
from training.errors import ConfigError, DatasetError
from training.sweep.config import load_run_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a configuration and data, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "support.yaml").write_text("adapter: support\ndata:\n  path: rows/a.jsonl\n")
    for name in ("rows/a.jsonl", "rows/more/b.jsonl", "other/a.jsonl", "rows/readme.md", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"{name} {number}", "completion": "yes"} for number in range(9)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def packed(*overrides: str) -> JobPackage:
    config = Path("support.yaml")
    return pack(config, list(overrides), load_config(config, overrides))


def data_of(package: JobPackage) -> dict[str, str]:
    return {name: str(file) for name, file in package.files.items() if name.startswith("data")}


def test_the_code_the_configuration_and_its_data_are_sent_and_nothing_else(project: Path) -> None:
    package = packed("lora.r=8")
    assert data_of(package) == {"data/a.jsonl": "rows/a.jsonl"}
    assert package.overrides == ["lora.r=8", "data.path=data/a.jsonl"]
    others = package.files.keys() - {"data/a.jsonl", "support.yaml"}
    assert "training/__main__.py" in others
    assert all(name.startswith("training/") and "__pycache__" not in name for name in others)
    assert sum(file.stat().st_size for file in package.files.values()) < 2**20


def test_the_sent_files_alone_read_the_same_configuration(project: Path, tmp_path: Path) -> None:
    output = dry_run_there(packed("lora.r=8"), tmp_path)
    assert "data/a.jsonl" in output
    assert "r: 8" in output


def test_the_sent_files_of_a_sweep_alone_list_the_same_trials(project: Path, tmp_path: Path) -> None:
    with (project / "support.yaml").open("a") as file:
        file.write("search:\n  learning_rate: {grid: [0.001, 0.01]}\n")
    sweep = Path("support.yaml")
    package = pack(sweep, ["seed=7"], load_run_config(sweep, ["seed=7"]))
    assert package.overrides == ["seed=7", "data.path=data/a.jsonl"]
    lines = [line.split() for line in dry_run_there(package, tmp_path).splitlines()]
    assert lines == [["trial", "learning_rate"], ["0", "0.001"], ["1", "0.01"]]


def dry_run_there(package: JobPackage, tmp_path: Path) -> str:
    """The configuration that the job's command prints where only the package exists."""
    package.write(tmp_path / "package.zip")
    zipfile.ZipFile(tmp_path / "package.zip").extractall(tmp_path / "there")
    # Without the checkout, which an editable installation puts on the path.
    code = (
        "import runpy, sys; from pathlib import Path; "
        "sys.path[:] = [''] + [p for p in sys.path if p and not Path(p, 'training').is_dir()]; "
        "runpy.run_module('training', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--config", package.config_name, *package.overrides, "--dry-run"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path / "there", env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_paths_of_every_kind_are_named_inside_the_package(project: Path) -> None:
    assert packed(f"data.path={project}/rows/a.jsonl").overrides == ["data.path=data/a.jsonl"]
    folder = packed("data.path=rows")
    assert data_of(folder).keys() == {"data/rows/a.jsonl", "data/rows/more/b.jsonl"}
    assert folder.overrides == ["data.path=data/rows"]
    pattern = packed("data.path=rows/**/*.jsonl")
    assert data_of(pattern).keys() == {"data/a.jsonl", "data/more/b.jsonl"}
    assert pattern.overrides == ["data.path=data/**/*.jsonl"]
    hub = packed("data.path=owner/name")
    assert not data_of(hub)
    assert hub.overrides == ["data.path=owner/name"]


def test_two_files_of_one_name_and_weights_stay_apart(project: Path) -> None:
    package = packed("data.path=[rows/a.jsonl, {path: other/a.jsonl, weight: 2.0}]", "data.held_out_path=rows/a.jsonl")
    assert data_of(package) == {"data/a.jsonl": "rows/a.jsonl", "data-2/a.jsonl": "other/a.jsonl"}
    data = load_config(Path("support.yaml"), package.overrides).data
    assert [(source.path, source.weight) for source in data.path] == [("data/a.jsonl", 1), ("data-2/a.jsonl", 2)]
    assert [source.path for source in data.held_out_path] == ["data/a.jsonl"]


def test_what_is_not_here_is_left_to_the_cluster_or_refused(project: Path) -> None:
    package = packed("data.path=/shared/rows.jsonl")
    assert package.remote_paths == ["/shared/rows.jsonl"]
    assert not data_of(package)
    with pytest.raises(DatasetError, match=r"rows/none\.jsonl"):
        packed("data.path=rows/none.jsonl")
    (project / "weights").mkdir()
    with pytest.raises(ConfigError, match=r"base_model is 'weights'.*absolute path"):
        packed("base_model=weights")
    with pytest.raises(ConfigError, match=r"storage_path is 'runs'.*absolute path"):
        packed("storage_path=runs")


def test_a_package_over_rays_limit_is_refused_before_it_is_sent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "rows/a.jsonl").write_bytes(os.urandom(3 * 2**20))
    monkeypatch.setattr("clients.jobs.package.MAX_PACKAGE_BYTES", 2 * 2**20)
    with pytest.raises(ConfigError, match=r"limit of 2\.0 MiB.*rows/a\.jsonl' \(3\.0 MiB\).*shared"):
        packed().write(project / "package.zip")


def test_the_same_files_are_the_same_bytes_and_other_data_has_another_hash(project: Path) -> None:
    package = packed()
    package.write(project / "one.zip")
    os.utime(project / "rows/a.jsonl", (1, 1))
    packed().write(project / "two.zip")
    assert (project / "one.zip").read_bytes() == (project / "two.zip").read_bytes()
    before = package.data_sha256()
    (project / "rows/a.jsonl").write_text('{"prompt": "new", "completion": "row"}\n')
    assert packed().data_sha256() != before
