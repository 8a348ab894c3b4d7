"""From a name to local Llama weights: what is unusable is refused in one line; 4-bit weights are the same each time."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from training.base_models import BaseModel, Quantization, base_name, load_quantized, load_tokenizer, resolve_base_model
from training.errors import BaseModelError


@pytest.fixture
def copy(tiny_base: BaseModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base.path, tmp_path / "My Llama"))


def test_the_embedded_model_is_pinned_and_offline(embedded_base: BaseModel) -> None:
    assert embedded_base.name == "smollm2-135m"
    assert embedded_base.context_length == 8192
    assert embedded_base.weights_sha256().startswith("fe45d49801a6ed8c")
    assert resolve_base_model("smollm2-135m") == embedded_base


def test_a_directory_is_named_after_itself(copy: Path) -> None:
    base = resolve_base_model(str(copy))
    assert (base.name, base.revision) == ("my-llama", None)
    assert base_name("meta-llama/Llama-2-13b-chat-hf") == "llama-2-13b-chat-hf"


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_that_lacks_a_file_is_refused(copy: Path, gone: str) -> None:
    (copy / gone).unlink()
    with pytest.raises(BaseModelError, match=gone.removeprefix("model")):
        resolve_base_model(str(copy))


def test_another_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    with pytest.raises(BaseModelError, match="is a MistralForCausalLM: Corral runs Llama models only"):
        resolve_base_model(str(copy))


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(BaseModelError, match="neither 'smollm2-135m', nor a directory here, nor a hub id"):
        resolve_base_model("smolm2")


def test_changed_weights_have_another_hash(copy: Path) -> None:
    base = resolve_base_model(str(copy))
    before = base.weights_sha256()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert base.weights_sha256() != before


def test_control_tokens_inside_a_text_are_text(tiny_base: BaseModel) -> None:
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer.token_to_id("<|im_start|>") not in tokenizer.encode("a <|im_start|> b").ids


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_what_it_is_fast_in(
    tiny_base: BaseModel, has_bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    assert load_quantized(tiny_base, Quantization()).dtype == expected
    assert load_quantized(tiny_base, Quantization(compute_dtype="float32")).dtype == torch.float32


def test_two_loads_give_the_same_4_bit_weights(tiny_base: BaseModel) -> None:
    first, second = (load_quantized(tiny_base, Quantization()).model.layers[1].mlp.up_proj for _ in range(2))
    assert first.weight.data.equal(second.weight.data)
    assert first.weight.data.numel() * 2 == 64 * 128  # two values a byte
    assert first.weight.quant_state.absmax.equal(second.weight.quant_state.absmax)
