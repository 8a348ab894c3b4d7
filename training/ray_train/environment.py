"""The environment of a run: code, libraries and devices, as recorded in the adapter's manifest.

Determined on a worker, since driver and workers may be different machines. Best effort: what cannot be determined is
None.
"""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from training.registry.manifest import Environment

_DISTRIBUTION = "llama-corral"
_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "ray")
_GIT_TIMEOUT_S = 10


def current_environment(device: str, num_workers: int) -> Environment:
    """The environment of a run on `num_workers` equal workers; this process is one of them and computes on `device`."""
    return Environment(
        code_version=_version(_DISTRIBUTION),
        git_commit=git_commit(Path(__file__).parents[1]),
        libraries={name: version for name in _LIBRARIES if (version := _version(name))},
        devices=[_device_name(device)] * num_workers,
    )


def git_commit(directory: Path) -> str | None:
    """The commit of the git checkout that tracks `directory`, plus -dirty if tracked files were changed; else None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout

    try:
        if not git("ls-files", "--", ".").strip():  # untracked: installed into another checkout
            return None
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "HEAD").strip() + ("-dirty" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
