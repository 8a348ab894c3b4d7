"""Adapter configurations as others write them: keys that change nothing are accepted, all others are refused (C4)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM

from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import LoraSettings
from training.errors import AdapterRefused
from training.registry.adapter_config import NOT_PLAIN_LORA, WITHOUT_EFFECT, AdapterConfig
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)

# What PEFT, Unsloth, LLaMA-Factory and Axolotl write around the same adapter.
SAME_OUTCOME = [
    ("task_type", None),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}),
    ("inference_mode", False),
    ("peft_version", "0.4.0.dev0@9320373c12353c4d6a6c5d0f4e0f9f1d8a6e5b3c"),
    ("revision", "main"),
    ("fan_in_fan_out", True),
    ("bias", "lora_only"),
    ("bias", "all"),
    ("lora_alpha", 8.0),
    ("lora_dropout", 0),
    ("init_lora_weights", False),
    ("init_lora_weights", None),
    ("init_lora_weights", "gaussian"),
    ("init_lora_weights", "Gaussian"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "orthogonal"),
    ("init_lora_weights", "mica"),
    ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
    ("eva_config", {"rho": 2.0}),
    ("corda_config", {"corda_method": "ipm"}),
    ("lora_ga_config", {"scale": "stable"}),
    ("qalora_group_size", 32),
    ("megatron_core", "megatron.core"),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("ensure_weight_tying", True),
    ("modules_to_save", []),
    ("trainable_token_indices", None),
    ("layer_replication", None),
    ("use_dora", None),
    ("target_modules", "all-linear"),
    ("target_modules", "All-Linear"),
    ("target_modules", UNSLOTH),
    ("target_modules", r".*\.(q|k|v|o|gate|up|down)_proj"),
    ("target_modules", [*LINEARS, "query_key_value", "c_attn"]),
    ("target_modules", [f"{layer}.{part}" for layer in "01" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]),
    ("exclude_modules", ["lm_head", "vision_tower"]),
    ("exclude_modules", r".*(vision|lm_head).*"),
    ("layers_to_transform", [0, 1]),
    ("layers_to_transform", []),
    ("rank_pattern", {}),
    ("rank_pattern", {"model.layers.0.self_attn.q_proj": 4, "up_proj": 4, "c_attn": 64}),
    ("alpha_pattern", {r".*_proj": 8.0}),
    ("a_key_of_tomorrow", None),
]  # fmt: skip


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def plain_logits(tiny_base: BaseCheckpoint, tiny_adapter: Path) -> torch.Tensor:
    return logits(tiny_base, tiny_adapter)


def logits(base: BaseCheckpoint, adapter: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        values: torch.Tensor = PeftModel.from_pretrained(model, adapter)(torch.arange(3, 40)[None]).logits
    return values


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.promise("C4")
@pytest.mark.filterwarnings("ignore")  # PEFT warns of keys that it ignores
@pytest.mark.parametrize(("key", "value"), SAME_OUTCOME)
def test_key_that_changes_nothing_in_peft_changes_nothing_here(
    adapter: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint, plain_logits: torch.Tensor, key: str, value: Any
) -> None:
    set_config(adapter, **{key: value})
    torch.testing.assert_close(logits(tiny_base, adapter), plain_logits, rtol=0, atol=0)
    files, plain = read_adapter(adapter, tiny_base), read_adapter(tiny_adapter, tiny_base)
    published = {**json.loads(plain.config_json), **({key: value} if key == "lora_dropout" else {})}
    assert (files.lora, json.loads(files.config_json)) == (plain.lora, published)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_parameters", "megatron_config"])
def test_null_is_as_if_absent(adapter: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint, key: str) -> None:
    set_config(adapter, **{key: None})
    assert read_adapter(adapter, tiny_base).lora == read_adapter(tiny_adapter, tiny_base).lora


@pytest.mark.promise("C4")
@pytest.mark.parametrize("key", ["task_type", "lora_dropout", "bias", "peft_version", "init_lora_weights"])
def test_key_may_be_missing(adapter: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint, key: str) -> None:
    fields = json.loads((adapter / CONFIG_FILE).read_text())
    fields.pop(key)
    (adapter / CONFIG_FILE).write_text(json.dumps(fields))
    assert read_adapter(adapter, tiny_base).lora == read_adapter(tiny_adapter, tiny_base).lora


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("fields", "effective"),
    [
        ({"lora_alpha": 6.5}, (4, 6.5)),
        ({"lora_alpha": 0.25}, (4, 0.25)),
        ({"r": 16, "rank_pattern": {".*": 4}}, (4, 8)),
        ({"lora_alpha": 99, "alpha_pattern": {"self_attn.*": 2.5, "mlp.*": 2.5}}, (4, 2.5)),
    ],
)
def test_rank_and_alpha_are_those_that_peft_uses(
    adapter: Path, tiny_base: BaseCheckpoint, fields: dict[str, Any], effective: tuple[int, float], rslora: bool
) -> None:
    set_config(adapter, **fields, use_rslora=rslora)
    files = read_adapter(adapter, tiny_base)
    assert (files.lora.r, files.lora.lora_alpha) == effective
    LoraSettings.model_validate(files.lora.model_dump())  # training may continue from it
    expected = logits(tiny_base, adapter)
    (adapter / CONFIG_FILE).write_bytes(files.config_json)
    assert (adapter / WEIGHTS_FILE).is_file()
    torch.testing.assert_close(logits(tiny_base, adapter), expected, rtol=0, atol=0)


@pytest.mark.promise("C4")
def test_every_key_of_peft_is_decided() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    decisions = [set(AdapterConfig.model_fields), set(WITHOUT_EFFECT), set(NOT_PLAIN_LORA)]
    assert fields == set.union(*decisions)
    assert len(fields) == sum(map(len, decisions)), "one decision each"


@pytest.mark.promise("C4")
@pytest.mark.parametrize("key", sorted(NOT_PLAIN_LORA))
@pytest.mark.parametrize("value", [True, 1, [1], {"a": 1}, "a"])
def test_other_kinds_of_adapter_are_refused_with_key_value_and_reason(
    adapter: Path, tiny_base: BaseCheckpoint, key: str, value: Any
) -> None:
    set_config(adapter, **{key: value})
    with pytest.raises(AdapterRefused) as exc_info:
        read_adapter(adapter, tiny_base)
    message = str(exc_info.value)
    assert message.startswith(str(adapter / CONFIG_FILE))
    assert f"key {key!r} is {value!r}: {NOT_PLAIN_LORA[key]}" in message


@pytest.mark.promise("C4")
@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "unknown"])
def test_initialization_that_changes_the_base_is_refused(adapter: Path, tiny_base: BaseCheckpoint, value: str) -> None:
    set_config(adapter, init_lora_weights=value)
    with pytest.raises(AdapterRefused, match=rf"key 'init_lora_weights': .* got '{value}'"):
        read_adapter(adapter, tiny_base)
