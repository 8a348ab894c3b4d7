"""Checks that an adapter folder written by PEFT must pass before it is published.

Only `adapter_config.json` and `adapter_model.safetensors` are read, by strict readers of this package: nothing that a
file names is imported, executed or fetched. What passes is plain LoRA on the linear layers of the given Llama, with
every tensor present and finite. Knows nothing of versions, aliases or storage.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaDims, LlamaLinear, module_path
from training.base_models.resolve import BaseCheckpoint, base_name
from training.errors import AdapterRefused
from training.registry.safetensors_header import read_json, read_safetensors_header, refuse, shortened, zero_tensors

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

_TARGET = re.compile(r"(?:(?:model\.)?layers\.\d+\.)?(?:(?:self_attn|mlp)\.)?(\w+_proj)")

_MAX_CONFIG_BYTES = 1 << 20
_UNSAFE_SUFFIXES = {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".py"}


class LoraParams(BaseModel):
    """Rank, scaling and target modules of an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
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


class _AdapterConfig(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"]
    r: Annotated[StrictInt, Field(ge=1, le=1024)]
    lora_alpha: Annotated[StrictInt, Field(ge=1)]
    target_modules: list[str] | str
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none"] = "none"
    use_rslora: StrictBool = False
    init_lora_weights: StrictBool | Literal["gaussian"] = True  # other initializations may change the base's weights
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: StrictBool = True
    # Ignored here, but set in the files that PEFT writes.
    peft_version: str | None = None
    megatron_core: str | None = None
    qalora_group_size: int | None = None


def read_adapter(directory: Path, base: BaseCheckpoint) -> AdapterFiles:
    """Check the adapter in `directory` against `base`; files other than the two are ignored.

    Raises:
        AdapterRefused: a check fails; the message names the file and the first problem.
    """
    config_file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    try:
        _check_present(directory)
        config, lora = _read_config(config_file)
        _check_base_name(config_file, config.base_model_name_or_path, base)
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


def _read_config(path: Path) -> tuple[_AdapterConfig, LoraParams]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        refuse(path, f"has {path.stat().st_size} bytes, the limit is {_MAX_CONFIG_BYTES}")
    fields = read_json(path, path.read_bytes())
    try:
        config = _AdapterConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        value = f", got {shortened(fields[key])}" if key in fields else ""
        refuse(path, f"key {key!r}: {first['msg'][:1].lower()}{first['msg'][1:]}{value}: only plain LoRA is supported")
    for key, value in (config.model_extra or {}).items():
        if not (value is None or value is False or value in ("", [], {})):
            refuse(path, f"key {key!r:.60} is {shortened(value)}: only plain LoRA is supported, train without it")
    names = config.target_modules
    if names == "all-linear":
        names = sorted(LLAMA_LINEARS)
    accepted = ", ".join(sorted(LLAMA_LINEARS))
    if isinstance(names, str):
        refuse(path, f"target_modules is the pattern {shortened(names)}: give a list of {accepted}")
    # PEFT may expand "all-linear" to the full name of every layer; the tensor check then finds any that is missing.
    linears = [match[1] if (match := _TARGET.fullmatch(name)) else name for name in names]
    unknown = [name for name in linears if name not in LLAMA_LINEARS]
    if unknown or not names:
        value = shortened(unknown[0] if unknown else names)
        refuse(path, f"target_modules has {value}: only {accepted} can be adapted")
    lora = LoraParams(r=config.r, lora_alpha=config.lora_alpha, target_modules=linears, use_rslora=config.use_rslora)
    return config, lora


def _check_base_name(path: Path, name_or_path: str | None, base: BaseCheckpoint) -> None:
    if not name_or_path or name_or_path in (base.source, str(base.path)):
        return
    # A folder on another machine has the same last component.
    if base_name(name_or_path) not in (base.name, base_name(base.path.name)):
        refuse(
            path,
            f"names the base {shortened(name_or_path)}, but the given base is {base.source!r}: "
            "pass the base that it names, or correct base_model_name_or_path if both have the same weights",
        )


def _published_config(config: _AdapterConfig, lora: LoraParams, base: BaseCheckpoint) -> bytes:
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
