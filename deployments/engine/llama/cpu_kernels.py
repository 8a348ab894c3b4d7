"""cpu_kernels.cpp, compiled for this machine and callable: `cpu_llama.py` and its tests come here.

The compiler is $CXX, g++ or clang++, or that of the package `ziglang`; the result is kept under CORRAL_HOME/kernels by
the hash of source, compiler and processor. Where nothing compiles, serving goes on with torch's operators.
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
# FMA is contracted in one way only, so that a compiler cannot order sums differently in two copies of a loop.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared"]
_COMPILE_TIMEOUT_S = 300
NUM_TARGETS = 7
PAGE = 16  # tokens in a KV block
COLUMNS = 32  # outputs of a linear come in multiples of this
GROUP = 64  # inputs of a linear come in multiples of this

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
            for name in ("token_ids", "positions", "slots", "sequences", "block_tables", "output_rows", "out")
        ],
    ]


class KernelsUnavailable(Exception):
    """The kernels cannot run here; the message says why."""


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Compile once, load once.

    Raises:
        KernelsUnavailable: no compiler, a compiler that fails, or a torch without libgomp.
    """
    if platform.system() != "Linux":
        raise KernelsUnavailable(f"they are for Linux, this is {platform.system()}")
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    site = Path(torch.__file__).parent.parent
    runtimes += sorted(site.glob("torch.libs/libgomp*"))
    if not runtimes:
        raise KernelsUnavailable("this build of torch brings no libgomp, whose threads they use")
    ctypes.CDLL(str(runtimes[0]), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(_compiled()))


def _compiled() -> Path:
    compiler = _compiler()
    sources = [path.read_text() for path in (_SOURCE, *_HEADERS)]
    identity = [*sources, *compiler, *_FLAGS, _processor()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = corral_home() / "kernels"
    done = folder / f"cpu-{name}.so"
    if done.exists():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if not done.exists():
            logger.info("compiling the CPU kernels with %s, about 20 seconds", compiler[0])
            fresh = folder / f".{name}.{os.getpid()}.so"
            command = [*compiler, *_FLAGS, "-o", str(fresh), str(_SOURCE)]
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise KernelsUnavailable(f"{shlex.join(compiler)}: {error}") from error
            if result.returncode != 0:
                lines = (result.stderr.strip() or "no message").splitlines()
                raise KernelsUnavailable(f"{shlex.join(compiler)} failed: {lines[0]}")
            fresh.replace(done)
    return done


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise KernelsUnavailable("no C++ compiler: install g++, or 'pip install ziglang', or set CXX")


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by different machines."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()
