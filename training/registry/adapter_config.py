"""The keys of PEFT's `adapter_config.json`: which are read, which change nothing, and which are refused.

A key is accepted where the adapter's outcome on a Llama is the same without it. Which layers the keys select is decided
in `target_modules.py`.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from training.registry.safetensors_header import read_json, refuse, shortened

_MAX_CONFIG_BYTES = 1 << 20

# They decide how A and B start, and leave the base as it is. The other initializations change the base's weights.
_HARMLESS_INITIALIZATIONS = {"gaussian", "eva", "orthogonal", "mica"}

# They say how the adapter was trained or how PEFT loads it, and not what it computes on the linear layers of a Llama.
# The configuration of an initialization counts only with that initialization.
WITHOUT_EFFECT: Final = frozenset(
    {
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
        "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "runtime_config",
    }
)  # fmt: skip

# Accepted only if empty; the value says what they do.
NOT_PLAIN_LORA: Final = {
    "alora_invocation_tokens": "it acts on the tokens after an invocation only",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it changes the base's weights",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it adds a bias to B",
    "modules_to_save": "it replaces whole modules of the base",
    "monteclora_config": "it samples its weights",
    "target_parameters": "it adapts parameters outside of linear layers",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "use_bdlora": "its A or B is block-diagonal",
    "use_dora": "it rescales the base's weights",
    "use_qalora": "it pools the inputs of A",
    "velora_config": "it saves further tensors",
}  # fmt: skip

Rank = Annotated[StrictInt, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(strict=True, gt=0, lt=3e38)]  # a float32 can hold it


class AdapterConfig(BaseModel):
    """The keys that are read; absent ones have PEFT's defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: StrictBool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: StrictBool | str | None = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[StrictInt] | StrictInt | None = None
    layers_pattern: Literal["layers", ""] | list[Literal["layers"]] | None = None  # a Llama has no other list of layers
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None

    @field_validator("init_lora_weights")
    @classmethod
    def _keeps_the_base(cls, value: bool | str | None) -> bool | str | None:
        if isinstance(value, str) and value.lower() not in _HARMLESS_INITIALIZATIONS:
            raise ValueError("the adapter belongs to weights that this initialization changed")
        return value


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read `adapter_config.json`; its `model_extra` has no effect.

    Raises:
        AdapterRefused: it is not valid JSON, or a key asks for more than LoRA; the message names the key.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        refuse(path, f"has {path.stat().st_size} bytes, the limit is {_MAX_CONFIG_BYTES}")
    fields = read_json(path, path.read_bytes())
    try:
        config = AdapterConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        value = f", got {shortened(fields[key])}" if key in fields else ""
        message = first["msg"].removeprefix("Value error, ")
        refuse(path, f"key {key!r}: {message[:1].lower()}{message[1:]}{value}: only plain LoRA is supported")
    for key, value in (config.model_extra or {}).items():
        if key in WITHOUT_EFFECT or value is None or value is False or value in ("", [], {}):
            continue
        reason = NOT_PLAIN_LORA.get(key, "its meaning is unknown")
        refuse(path, f"key {key!r:.60} is {shortened(value)}: {reason}; only plain LoRA is supported, train without it")
    return config
