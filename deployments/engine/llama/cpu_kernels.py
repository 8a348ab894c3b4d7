"""Compiles cpu_kernels.cpp for this machine and loads it with ctypes.

The compiler is $CXX, g++, clang++ or the one in the package `ziglang`, in this order. The library is cached under
CORRAL_HOME/kernels by a hash of sources, compiler and processor.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock

from training.home import corral_home

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = [_SOURCE.with_name(name) for name in ("abi.h", "nf4.h", "simd.h")]
# One rule for FMA contraction, so that the compiler cannot round sums differently in two copies of a loop.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared"]
_COMPILE_TIMEOUT_S = 300
NUM_TARGETS = 7
PAGE = 16  # tokens in a KV block
COLUMNS = 32  # the outputs of a linear are a multiple of this
GROUP = 64  # the inputs of a linear are a multiple of this

_pointer = ctypes.c_void_p
_int = ctypes.c_int32


class Linear(ctypes.Structure):
    """`struct Linear`."""

    _fields_ = [
        ("codes", _pointer),
        ("absmax", _pointer),
        ("nested_code", _pointer),
        ("nested_absmax", _pointer),
        ("offset", ctypes.c_float),
        ("n", _int),
        ("k", _int),
    ]


class Layer(ctypes.Structure):
    """`struct Layer`."""

    _fields_ = [
        ("linears", Linear * NUM_TARGETS),
        ("input_norm", _pointer),
        ("post_norm", _pointer),
        ("keys", _pointer),
        ("values", _pointer),
    ]


class Lora(ctypes.Structure):
    """`struct Lora`."""

    _fields_ = [("a", _pointer), ("b", _pointer), ("scaling", ctypes.c_float), ("r", _int)]


class Model(ctypes.Structure):
    """`struct Model`."""

    _fields_ = [
        *[(name, _pointer) for name in ("layers", "loras", "embed_tokens", "lm_head", "norm", "cos", "sin")],
        ("eps", ctypes.c_float),
        *[
            (name, _int)
            for name in (
                "num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "max_rank",
                "num_threads",
            )
        ],
    ]  # fmt: skip


class Batch(ctypes.Structure):
    """`struct Batch`."""

    _fields_ = [
        *[(name, _int) for name in ("num_tokens", "num_out", "table_width")],
        *[
            (name, _pointer)
            for name in ("token_ids", "positions", "slots", "sequences", "block_tables", "out_rows", "out")
        ],
    ]


class KernelsUnavailable(Exception):
    """The kernels cannot run on this machine or with this model; the message says why."""


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Load the kernels, compiling them on first use.

    Raises:
        KernelsUnavailable: this is not Linux, no compiler works, or torch does not include libgomp.
    """
    if platform.system() != "Linux":
        raise KernelsUnavailable(f"they need Linux, this is {platform.system()}")
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    site = Path(torch.__file__).parent.parent
    runtimes += sorted(site.glob("torch.libs/libgomp*"))
    if not runtimes:
        raise KernelsUnavailable("this build of torch does not include libgomp, whose threads they use")
    ctypes.CDLL(str(runtimes[0]), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(_compile()))


def _compile() -> Path:
    compiler = _compiler()
    sources = [path.read_text() for path in (_SOURCE, *_HEADERS)]
    identity = [*sources, *compiler, *_FLAGS, _cpu_features()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = corral_home() / "kernels"
    library = folder / f"cpu-{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if not library.exists():
            logger.info("compiling the CPU kernels with %s, about 20 seconds", compiler[0])
            temporary = folder / f".{name}.{os.getpid()}.so"
            command = [*compiler, *_FLAGS, "-o", str(temporary), str(_SOURCE)]
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise KernelsUnavailable(f"{shlex.join(compiler)}: {error}") from error
            if result.returncode != 0:
                lines = (result.stderr.strip() or "no message").splitlines()
                raise KernelsUnavailable(f"{shlex.join(compiler)} failed: {lines[0]}")
            temporary.replace(library)
    return library


def _compiler() -> list[str]:
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise KernelsUnavailable("no C++ compiler found: install g++, run 'pip install ziglang', or set CXX")


def _cpu_features() -> str:
    """The CPU features that `-march=native` depends on; machines that share a home directory may differ in them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()
