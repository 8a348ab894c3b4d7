"""What an adapter folder written by PEFT must be before the registry publishes it.

Two files count, `adapter_config.json` and `adapter_model.safetensors`, and both are read by this module's own
narrow readers: nothing is imported, executed or fetched because a file says so. What passes is plain LoRA on
the linear layers of the given Llama, complete and finite. It does not know versions, aliases or where files go.
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
    """Rank, scaling and place of an adapter's matrices."""

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
        """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A folder that passed every check.

    Attributes:
        lora: what `adapter_config.json` says.
        config_json: the `adapter_config.json` to publish, written anew from the accepted keys.
        weights: the source's `adapter_model.safetensors`.
        weights_sha256: of the bytes that were checked.
        changes: whether B @ A is other than zero for any layer; PEFT starts with B at zero.
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
    init_lora_weights: StrictBool | Literal["gaussian"] = True  # the other ways may change the base's weights
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: StrictBool = True
    # Without effect here, yet not empty in the files that PEFT writes.
    peft_version: str | None = None
    megatron_core: str | None = None
    qalora_group_size: int | None = None


def read_adapter(directory: Path, base: BaseCheckpoint) -> AdapterFiles:
    """Check the adapter in `directory` against `base`; other files beside the two are left alone.

    Raises:
        AdapterRefused: naming the file and the first thing wrong with it.
    """
    config_file, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    try:
        _check_present(directory)
        config, lora = _read_config(config_file)
        _check_named_base(config_file, config.base_model_name_or_path, base)
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        zero = _check_tensors(weights, lora_shapes(base, lora))
    except OSError as error:
        raise AdapterRefused(f"adapter folder {directory} cannot be read: {error.strerror or error}") from error
    layers = {name.rpartition(".lora_")[0] for name in lora_shapes(base, lora)}
    changes = any(not {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} & zero for layer in layers)
    return AdapterFiles(lora, _published_config(config, lora, base), weights, sha256, changes)


def lora_shapes(base: BaseCheckpoint, lora: LoraParams) -> dict[str, tuple[int, int]]:
    """Every tensor name that PEFT writes for `lora` on `base`, with its shape: A [r, in], B [out, r]."""
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
        raise AdapterRefused(f"{directory} is not a folder: name one that PEFT's save_pretrained wrote")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (directory / name).is_file():
            continue
        unsafe = sorted(p.name for p in directory.iterdir() if p.suffix.lower() in _UNSAFE_SUFFIXES)
        if name == WEIGHTS_FILE and unsafe:
            raise AdapterRefused(
                f"{directory} has {unsafe[0]} but no {name}: files that can run code are never loaded; "
                "save the adapter with save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterRefused(f"{directory} has no {name}: name a folder that PEFT's save_pretrained wrote")


def _read_config(path: Path) -> tuple[_AdapterConfig, LoraParams]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        refuse(path, f"has {path.stat().st_size} bytes, at most {_MAX_CONFIG_BYTES} are read")
    fields = read_json(path, path.read_bytes())
    try:
        config = _AdapterConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        given = f"{shortened(fields[key])} is given" if key in fields else "nothing is given"
        refuse(path, f"key {key!r}: {first['msg'][:1].lower()}{first['msg'][1:]}, {given}: only plain LoRA is served")
    for key, value in (config.model_extra or {}).items():
        if not (value is None or value is False or value in ("", [], {})):
            refuse(path, f"key {key!r:.60} is {shortened(value)}: only plain LoRA is served, train without it")
    names = config.target_modules
    if names == "all-linear":
        names = sorted(LLAMA_LINEARS)
    accepted = ", ".join(sorted(LLAMA_LINEARS))
    if isinstance(names, str):
        refuse(path, f"target_modules is the pattern {shortened(names)}: give a list of {accepted}")
    # PEFT may write "all-linear" out as the full name of every layer; the tensors then show whether none is left out.
    linears = [match[1] if (match := _TARGET.fullmatch(name)) else name for name in names]
    others = [name for name in linears if name not in LLAMA_LINEARS]
    if others or not names:
        refuse(path, f"target_modules has {shortened(others[0] if others else names)}: only {accepted} can be adapted")
    shape = LoraParams(r=config.r, lora_alpha=config.lora_alpha, target_modules=linears, use_rslora=config.use_rslora)
    return config, shape


def _check_named_base(path: Path, named: str | None, base: BaseCheckpoint) -> None:
    if not named or named in (base.source, str(base.path)):
        return
    last = base_name(named)
    if last not in (base.name, base_name(base.path.name)):  # another machine's folder has the same last component
        refuse(
            path,
            f"says that the adapter was trained on {shortened(named)}, the base given is {base.source!r}: "
            "give that base, or correct base_model_name_or_path if both are the same weights",
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
    """Returns the names of tensors that hold nothing but zeros."""
    entries = read_safetensors_header(path)
    if extra := sorted(entries.keys() - expected.keys()):
        refuse(path, f"has {len(extra)} tensors that its config does not name, the first is {extra[0]!r:.120}")
    if missing := sorted(expected.keys() - entries.keys()):
        refuse(path, f"lacks {len(missing)} tensors that its config names, the first is {missing[0]!r}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            refuse(path, f"has {name!r} of shape {list(entries[name].shape)}, config and base ask for {list(shape)}")
    return zero_tensors(path, entries.items())
