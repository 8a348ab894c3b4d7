"""What a run is computed with."""

import subprocess
from importlib import metadata
from pathlib import Path

from training.ray_train.environment import current_environment, git_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_libraries_have_the_versions_installed_and_every_worker_a_device() -> None:
    found = current_environment("cpu", num_workers=2)
    assert found.libraries["peft"] == metadata.version("peft")
    assert {"torch", "transformers", "trl", "bitsandbytes", "ray"} < found.libraries.keys()
    assert len(found.devices) == 2
    assert all(found.devices)


def test_commit_of_a_checkout_tells_whether_its_files_were_changed(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # nothing in it is tracked
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (package / "untracked").write_text("")
    assert git_commit(package) == head
    (package / "a.py").write_text("2")
    assert git_commit(package) == f"{head}-dirty"
    (tmp_path / "installed").mkdir()
    assert git_commit(tmp_path / "installed") is None  # a folder in somebody else's checkout
