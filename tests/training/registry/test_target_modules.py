"""Which layers are adapted, and how: as in PEFT where it adapts whole kinds of linear layers; else refused (C4)."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from training.base_models.llama_shape import LLAMA_LINEARS
from training.errors import AdapterRefused
from training.registry.adapter_config import AdapterConfig
from training.registry.target_modules import Targets, resolve_targets

FILE = Path("adapter_config.json")


def resolved(**keys: Any) -> Targets:
    return resolve_targets(FILE, AdapterConfig(peft_type="LORA", **keys), 2)


def in_peft(**keys: Any) -> Targets | None:
    """What PEFT adapts in a Llama of two layers; None if these are not whole kinds of linear layers, all alike."""
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        try:
            inject_adapter_in_model(LoraConfig(**keys), model)
        except (ValueError, re.error):  # it selects nothing, or a module that PEFT cannot adapt
            return None
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    kinds = {name.rpartition(".")[2] for name in adapted}
    values = {(module.r["default"], module.lora_alpha["default"]) for module in adapted.values()}
    if len(adapted) != 2 * len(kinds) or not kinds <= set(LLAMA_LINEARS) or len(values) != 1:
        return None
    return Targets([linear for linear in LLAMA_LINEARS if linear in kinds], *values.pop())


parts = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "self_attn", "mlp", *LLAMA_LINEARS, "lm_head", "norm", "c_attn"]),
    min_size=1, max_size=3,
).map(".".join)  # fmt: skip
names = st.one_of(
    st.sampled_from(LLAMA_LINEARS),
    st.sampled_from(["self_attn.q_proj", "model.layers.0.mlp.up_proj", "1.mlp.up_proj", "lm_head", "vision.q_proj"]),
    parts,
)
patterns = st.sampled_from(
    ["all-linear", r".*_proj", r".*\.(q|v)_proj", r".*\d\..*_proj", r".*\.0\..*_proj", ".*", r".*mlp\.\w+", "q_proj",
     r"(?i).*Q_PROJ", r"model\.layers\.\d+\.self_attn\.[qkv]_proj", r".*(lm_head|down_proj)", ""]
)  # fmt: skip
selections = st.one_of(st.none(), patterns, st.lists(names, max_size=4), st.just(list(LLAMA_LINEARS)))
values = st.dictionaries(st.one_of(names, patterns), st.sampled_from([4, 8]), max_size=2)


@pytest.mark.promise("C4")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(target=selections, exclude=selections, ranks=values, alphas=values)
def test_selection_is_that_of_peft_or_refused(
    target: Any, exclude: Any, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    keys = {"target_modules": target, "exclude_modules": exclude, "rank_pattern": ranks, "alpha_pattern": alphas}
    ours: Targets | None
    try:
        ours = resolved(**keys, r=4, lora_alpha=8)
    except AdapterRefused:
        ours = None
    assert ours == in_peft(**keys, r=4, lora_alpha=8)


@pytest.mark.promise("C4")
@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"target_modules": ".*"}, "selects 'lm_head'"),
        ({"target_modules": r".*\.0\..*_proj"}, "selects q_proj in 1 of 2 layers"),
        ({"target_modules": ["q_proj", "1.self_attn.v_proj"]}, "selects v_proj in 1 of 2 layers"),
        ({"target_modules": "q_proj"}, "selects no linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]}, None),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "without exclude_modules ['q_proj']"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "'layers_to_transform' is 1"),
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, "'rank_pattern' gives"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"a" * 3000 + "(": 2}}, "no regular expression"),
    ],
)
def test_refusal_says_what_was_selected(keys: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        resolved(**keys)
        return
    with pytest.raises(AdapterRefused) as exc_info:
        resolved(**keys)
    assert reason in str(exc_info.value)
    assert len(str(exc_info.value)) < 400


@pytest.mark.promise("C5")
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_pattern_that_never_ends_is_refused_in_seconds(key: str) -> None:
    pattern = r"(?:(?:.*)*)*x"
    keys = {"target_modules": pattern} if key == "target_modules" else {"rank_pattern": {pattern: 8}}
    started = time.monotonic()
    with pytest.raises(AdapterRefused, match="takes more than 10 s to match"):
        resolved(**keys)
    assert time.monotonic() - started < 30


def test_long_list_of_names_takes_no_time() -> None:
    started = time.monotonic()
    assert resolved(target_modules=["q_proj", *(f"block.{number}" for number in range(100_000))]).linears == ["q_proj"]
    assert time.monotonic() - started < 10
