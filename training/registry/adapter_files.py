"""Checks that an adapter folder written by PEFT must pass before it is published.

Only `adapter_config.json` and `adapter_model.safetensors` are read, by strict readers of this package: nothing that a
file names is imported, executed or fetched. What passes is plain LoRA on the linear layers of the given Llama, with
every tensor present and finite. Knows nothing of versions, aliases or storage.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaDims, LlamaLinear, module_path
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused
from training.registry.adapter_config import AdapterConfig, read_adapter_config
from training.registry.safetensors_header import read_safetensors_header, refuse, shortened, zero_tensors
from training.registry.target_modules import Targets, resolve_targets

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

_UNSAFE_SUFFIXES = {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".py"}


class LoraParams(BaseModel):
    """Rank, scaling and target modules of an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(ge=1)
    lora_alpha: int | float = Field(gt=0, allow_inf_nan=False)
    target_modules: list[LlamaLinear]
    use_rslora: bool = False

    @field_validator("target_modules")
    @classmethod
    def _sorted_linear_layers(cls, names: list[str]) -> list[str]:
        if not names or not set(LLAMA_LINEARS).issuperset(names):
            raise ValueError(f"must name some of {', '.join(sorted(LLAMA_LINEARS))}")
        return sorted(set(names))

    @property
    def scaling(self) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder that passed every check.

    Attributes:
        lora: the LoRA parameters from `adapter_config.json`.
        config_json: the `adapter_config.json` to publish, rebuilt from the accepted keys.
        weights: path of the source's `adapter_model.safetensors`.
        weights_sha256: hash of the bytes that were checked.
        changes: whether B @ A is nonzero for any layer; PEFT initializes B with zeros.
    """

    lora: LoraParams
    config_json: bytes
    weights: Path
    weights_sha256: str
    changes: bool


def read_adapter(directory: Path, base: BaseCheckpoint) -> AdapterFiles:
    """Check the adapter in `directory` against `base`; files other than the two are ignored.

    Raises:
        AdapterRefused: a check fails; the message names the file and the first problem.
    """
    config_file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    try:
        _check_present(directory)
        config = read_adapter_config(config_file)
        _check_base_name(config_file, config.base_model_name_or_path, base)
        _check_bias(config_file, config, base)
        lora = _lora_params(config, resolve_targets(config_file, config, LlamaDims.of(base.llama_config()).num_layers))
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        zero_names = _check_tensors(weights, lora_shapes(base, lora))
    except OSError as error:
        raise AdapterRefused(f"adapter folder {directory} cannot be read: {error.strerror or error}") from error
    layers = {name.rpartition(".lora_")[0] for name in lora_shapes(base, lora)}
    changes = any(not {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} & zero_names for layer in layers)
    return AdapterFiles(lora, _published_config(config, lora, base), weights, sha256, changes)


def lora_shapes(base: BaseCheckpoint, lora: LoraParams) -> dict[str, tuple[int, int]]:
    """The name and shape of every tensor that PEFT writes for `lora` on `base`: A [r, in], B [out, r]."""
    dims = LlamaDims.of(base.llama_config())
    shapes = {}
    for layer in range(dims.num_layers):
        for linear in lora.target_modules:
            prefix = f"base_model.model.model.layers.{layer}.{module_path(linear)}"
            size_in, size_out = dims.linears[linear]
            shapes[f"{prefix}.lora_A.weight"] = (lora.r, size_in)
            shapes[f"{prefix}.lora_B.weight"] = (size_out, lora.r)
    return shapes


def _check_present(directory: Path) -> None:
    if not directory.is_dir():
        raise AdapterRefused(f"{directory} is not a folder: pass one written by PEFT's save_pretrained")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (directory / name).is_file():
            continue
        unsafe = sorted(p.name for p in directory.iterdir() if p.suffix.lower() in _UNSAFE_SUFFIXES)
        if name == WEIGHTS_FILE and unsafe:
            raise AdapterRefused(
                f"{directory} has {unsafe[0]} but no {name}: files that can run code are never loaded; "
                "save the adapter with save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterRefused(f"{directory} has no {name}: pass a folder written by PEFT's save_pretrained")


def _lora_params(config: AdapterConfig, targets: Targets) -> LoraParams:
    alpha = int(targets.lora_alpha) if float(targets.lora_alpha).is_integer() else targets.lora_alpha
    return LoraParams(r=targets.r, lora_alpha=alpha, target_modules=targets.linears, use_rslora=config.use_rslora)


def _check_bias(path: Path, config: AdapterConfig, base: BaseCheckpoint) -> None:
    has_biases = any(base.llama_config().get(key) for key in ("attention_bias", "mlp_bias"))
    if config.bias != "none" and has_biases:
        refuse(path, f"key 'bias' is {config.bias!r}: it replaces biases of the base; only plain LoRA is supported")


def _check_base_name(path: Path, name_or_path: str | None, base: BaseCheckpoint) -> None:
    if name_or_path and not base.is_named(name_or_path):
        refuse(
            path,
            f"names the base {shortened(name_or_path)}, but the given base is {base.source!r}: "
            "pass the base that it names, or correct base_model_name_or_path if both have the same weights",
        )


def _published_config(config: AdapterConfig, lora: LoraParams, base: BaseCheckpoint) -> bytes:
    from_hub = base.revision is not None and base.source != EMBEDDED_MODEL
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source if from_hub else str(base.path),
        "revision": base.revision if from_hub else None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": lora.target_modules,
        "use_rslora": lora.use_rslora,
        "bias": "none",
    }
    return json.dumps(fields, indent=2).encode() + b"\n"


def _check_tensors(path: Path, expected: dict[str, tuple[int, int]]) -> set[str]:
    """Check names, shapes and values; returns the names of all-zero tensors."""
    entries = read_safetensors_header(path)
    if extra := sorted(entries.keys() - expected.keys()):
        refuse(path, f"has {len(extra)} tensors that its config does not name, the first is {extra[0]!r:.120}")
    if missing := sorted(expected.keys() - entries.keys()):
        refuse(path, f"lacks {len(missing)} tensors that its config names, the first is {missing[0]!r}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            refuse(path, f"has {name!r} of shape {list(entries[name].shape)}, config and base require {list(shape)}")
    return zero_tensors(path, entries.items())
