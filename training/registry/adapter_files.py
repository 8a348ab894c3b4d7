"""What an adapter folder written by PEFT must be before the registry publishes it.

Two files count, `adapter_config.json` and `adapter_model.safetensors`, and both are read by this module's own
narrow readers: nothing is imported, executed or fetched because a file says so. What passes is plain LoRA on
the linear layers of the given Llama, complete and finite. It does not know versions, aliases or where files go.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from training.base_models.resolve import EMBEDDED_MODEL, BaseModel, base_name
from training.errors import AdapterRefused

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR_LAYERS = frozenset(_ATTENTION + _MLP)
_TARGET = re.compile(r"(?:(?:model\.)?layers\.\d+\.)?(?:(?:self_attn|mlp)\.)?(\w+_proj)")

_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 10_000_000  # the format allows 100 MB; a LoRA of 80 layers needs 200 kB
_FORMATS = {  # dtype: (bytes per value, bits that are all set in NaN and Inf only)
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}
_UNSAFE_SUFFIXES = {".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".py"}


class LoraShape(PydanticModel):
    """Rank, scaling and place of an adapter's matrices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    target_modules: list[str]
    use_rslora: bool = False

    @field_validator("target_modules")
    @classmethod
    def _sorted_linear_layers(cls, names: list[str]) -> list[str]:
        if not names or not LINEAR_LAYERS.issuperset(names):
            raise ValueError(f"must name some of {', '.join(sorted(LINEAR_LAYERS))}")
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

    lora: LoraShape
    config_json: bytes
    weights: Path
    weights_sha256: str
    changes: bool


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _AdapterConfig(PydanticModel):
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


def read_adapter(directory: Path, base: BaseModel) -> AdapterFiles:
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


def lora_shapes(base: BaseModel, lora: LoraShape) -> dict[str, tuple[int, int]]:
    """Every tensor name that PEFT writes for `lora` on `base`, with its shape: A [r, in], B [out, r]."""
    config = base.llama_config()
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    intermediate = int(config["intermediate_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    sizes = {  # in, out
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, kv_heads * head_dim),
        "v_proj": (hidden, kv_heads * head_dim),
        "o_proj": (heads * head_dim, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    shapes = {}
    for layer in range(int(config["num_hidden_layers"])):
        for linear in lora.target_modules:
            block = "self_attn" if linear in _ATTENTION else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{linear}"
            size_in, size_out = sizes[linear]
            shapes[f"{prefix}.lora_A.weight"] = (lora.r, size_in)
            shapes[f"{prefix}.lora_B.weight"] = (size_out, lora.r)
    return shapes


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, whose data fill the rest of the file without gap or overlap.

    Raises:
        AdapterRefused: the header is too large, not what the format says, or leads outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            _refuse(path, f"is cut off: {size} bytes, of which the header alone would take {length + 8}")
        if length > _MAX_HEADER_BYTES:
            _refuse(path, f"has a header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
        header = _read_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, f"has metadata {_short(metadata)} where the format knows only texts by name")
    entries = {name: _tensor_entry(path, name, fields, 8 + length) for name, fields in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            _refuse(path, f"has a {'gap' if entry.start > position else 'overlap'} in its data before {name!r:.120}")
        position = entry.end
    if position != size:
        _refuse(path, f"holds {size} bytes, its header describes {position}")
    return entries


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


def _read_config(path: Path) -> tuple[_AdapterConfig, LoraShape]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        _refuse(path, f"has {path.stat().st_size} bytes, at most {_MAX_CONFIG_BYTES} are read")
    fields = _read_json(path, path.read_bytes())
    try:
        config = _AdapterConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        given = f"{_short(fields[key])} is given" if key in fields else "nothing is given"
        _refuse(path, f"key {key!r}: {first['msg'][:1].lower()}{first['msg'][1:]}, {given}: only plain LoRA is served")
    for key, value in (config.model_extra or {}).items():
        if not (value is None or value is False or value in ("", [], {})):
            _refuse(path, f"key {key!r:.60} is {_short(value)}: only plain LoRA is served, train without it")
    names = config.target_modules
    if names == "all-linear":
        names = sorted(LINEAR_LAYERS)
    accepted = ", ".join(sorted(LINEAR_LAYERS))
    if isinstance(names, str):
        _refuse(path, f"target_modules is the pattern {_short(names)}: give a list of {accepted}")
    # PEFT may write "all-linear" out as the full name of every layer; the tensors then show whether none is left out.
    linears = [match[1] if (match := _TARGET.fullmatch(name)) else name for name in names]
    others = [name for name in linears if name not in LINEAR_LAYERS]
    if others or not names:
        _refuse(path, f"target_modules has {_short(others[0] if others else names)}: only {accepted} can be adapted")
    shape = LoraShape(r=config.r, lora_alpha=config.lora_alpha, target_modules=linears, use_rslora=config.use_rslora)
    return config, shape


def _check_named_base(path: Path, named: str | None, base: BaseModel) -> None:
    if not named or named in (base.source, str(base.path)):
        return
    last = base_name(named)
    if last not in (base.name, base_name(base.path.name)):  # another machine's folder has the same last component
        _refuse(
            path,
            f"says that the adapter was trained on {_short(named)}, the base given is {base.source!r}: give that base, "
            "or correct base_model_name_or_path if both are the same weights",
        )


def _published_config(config: _AdapterConfig, lora: LoraShape, base: BaseModel) -> bytes:
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
        _refuse(path, f"has {len(extra)} tensors that its config does not name, the first is {extra[0]!r:.120}")
    if missing := sorted(expected.keys() - entries.keys()):
        _refuse(path, f"lacks {len(missing)} tensors that its config names, the first is {missing[0]!r}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            _refuse(path, f"has {name!r} of shape {list(entries[name].shape)}, config and base ask for {list(shape)}")
    return _check_values(path, entries.items())


def _check_values(path: Path, entries: Iterable[tuple[str, TensorEntry]]) -> set[str]:
    import numpy as np

    zero = set()
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for name, entry in entries:
        width, exponent = _FORMATS[entry.dtype]
        values = np.frombuffer(data[entry.start : entry.end].tobytes(), dtype=f"<u{width}")
        bad = (values & exponent) == exponent
        if bad.any():
            _refuse(path, f"has {int(bad.sum())} NaN or infinite values in {name!r}: the training run diverged")
        sign = 1 << (8 * width - 1)
        if not (values & (sign - 1)).any():
            zero.add(name)
    return zero


def _tensor_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(fields) == 3:
            pass
        case _:
            _refuse(path, f"describes {name!r:.120} in a way that the format does not know: {_short(fields)}")
    if dtype not in _FORMATS:
        _refuse(path, f"has {name!r:.120} in {_short(dtype)}: only {', '.join(_FORMATS)} are read")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)) or len(shape) > 2:
        _refuse(path, f"gives {name!r:.120} the shape {_short(shape)} and the place {_short([start, end])}")
    needed = math.prod(shape) * _FORMATS[dtype][0]
    if end - start != needed:
        _refuse(path, f"gives {name!r:.120} {end - start} bytes, {dtype} of shape {_short(shape)} takes {needed}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def _read_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key is given twice")
        return fields

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        _refuse(path, "is nested too deeply")
    except ValueError as error:
        _refuse(path, f"is not the JSON it should be: {str(error)[:120]}")
    if not isinstance(value, dict):
        _refuse(path, f"holds {_short(value)} where a JSON object belongs")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(path: PurePath, reason: str) -> NoReturn:
    raise AdapterRefused(f"{path} {reason}")
