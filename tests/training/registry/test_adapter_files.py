"""Adapter folders that are accepted and refused (P C4, C5): real PEFT output, and corrupted copies of it."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.base_models.llama_shape import LLAMA_LINEARS
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused
from training.registry.adapter_files import LoraParams, lora_shapes, read_adapter
from training.registry.safetensors_header import read_safetensors_header

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def refusal(folder: Path, base: BaseCheckpoint) -> str:
    with pytest.raises(AdapterRefused) as exc_info:
        read_adapter(folder, base)
    message = str(exc_info.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_weights(folder: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "adapter_model.safetensors").write_bytes(size + text + data)


def save_weights(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")


def load_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.promise("E4")
def test_peft_output_is_accepted_and_its_config_rewritten(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    files = read_adapter(adapter, tiny_base)
    assert files.lora == LoraParams(r=4, lora_alpha=8, target_modules=sorted(LLAMA_LINEARS))
    assert files.lora.scaling == 2
    assert json.loads(files.config_json) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_base.path),
        "revision": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": sorted(LLAMA_LINEARS),
        "use_rslora": False,
        "bias": "none",
    }


def test_published_config_names_hub_id_and_revision(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    base = BaseCheckpoint("tiny-llama", "acme/tiny-llama", tiny_base.path, "0123abc")
    config = json.loads(read_adapter(adapter, base).config_json)
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny-llama", "0123abc")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_adapters_are_accepted(adapter: Path, tiny_base: BaseCheckpoint, dtype: str) -> None:
    import torch

    save_weights(adapter, {name: value.to(getattr(torch, dtype)) for name, value in load_weights(adapter).items()})
    read_adapter(adapter, tiny_base)


def test_rslora_scales_by_the_root_of_r(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    set_config(adapter, use_rslora=True)
    assert read_adapter(adapter, tiny_base).lora.scaling == 4


@pytest.mark.promise("C4")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("r", 0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_alpha", 0.0),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_alpha", 10**400),
        ("lora_dropout", 2),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 16}),
        ("layers_to_transform", 0),
        ("layers_to_transform", [1]),
        ("layers_pattern", "blocks"),
        ("layer_replication", [[0, 2]]),
        ("auto_map", {"AutoModel": "evil.Evil"}),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("a_key_of_tomorrow", 1),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["embed_tokens"]),
        ("target_modules", []),
        ("target_modules", ["vision.layers.0.q_proj"]),
    ],
)
def test_config_that_is_not_plain_lora_is_refused_by_key(
    adapter: Path, tiny_base: BaseCheckpoint, key: str, value: Any
) -> None:
    set_config(adapter, **{key: value})
    assert key in refusal(adapter, tiny_base)


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"r": 4, "r": 8}',
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=["empty", "list", "bytes", "nan", "twice", "deep", "long number", "large"],
)
def test_broken_config_is_refused(adapter: Path, tiny_base: BaseCheckpoint, text: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(text)
    assert "adapter_config.json" in refusal(adapter, tiny_base)


@pytest.mark.parametrize("base_name", ["", None, "acme/Tiny-Llama", "/home/somebody/models/tiny-llama"])
def test_base_named_elsewhere_by_the_same_last_component_is_accepted(
    adapter: Path, tiny_base: BaseCheckpoint, base_name: str | None
) -> None:
    set_config(adapter, base_model_name_or_path=base_name)
    read_adapter(adapter, tiny_base)


@pytest.mark.promise("C4")
def test_excluded_layers_have_no_tensors(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    set_config(adapter, exclude_modules=["q_proj"])
    assert "q_proj" in refusal(adapter, tiny_base)
    save_weights(adapter, {k: v for k, v in load_weights(adapter).items() if "q_proj" not in k})
    assert "q_proj" not in read_adapter(adapter, tiny_base).lora.target_modules


@pytest.mark.promise("C4")
@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_trained_biases_are_refused_where_the_base_has_biases(
    adapter: Path, tiny_base: BaseCheckpoint, tmp_path: Path, key: str
) -> None:
    other = tmp_path / "tiny-llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**tiny_base.llama_config(), key: True}))
    set_config(adapter, bias="lora_only")
    assert "'bias' is 'lora_only'" in refusal(adapter, BaseCheckpoint("tiny-llama", str(other), other, None))
    read_adapter(adapter, tiny_base)


@pytest.mark.promise("C4")
def test_adapter_of_another_base_is_refused_with_both_names(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    set_config(adapter, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    message = refusal(adapter, tiny_base)
    assert "meta-llama/Llama-2-7b-hf" in message
    assert tiny_base.source in message


class _Boom:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.trap,))


@pytest.mark.promise("C4")
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pkl", "adapter.pt", "modeling.py"])
def test_files_that_run_code_are_refused_by_name_and_not_run(
    adapter: Path, tiny_base: BaseCheckpoint, tmp_path: Path, name: str
) -> None:
    trap = tmp_path / "ran"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickle.dumps(_Boom(trap)))
    assert name in refusal(adapter, tiny_base)
    assert not trap.exists()


def test_folder_without_adapter_is_refused(tmp_path: Path, tiny_base: BaseCheckpoint) -> None:
    assert "is not a folder" in refusal(tmp_path / "absent", tiny_base)
    assert "adapter_config.json" in refusal(tmp_path, tiny_base)


def _gap(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[last]["data_offsets"] = [n + 4 for n in header[last]["data_offsets"]]
    return header, data + bytes(4)


def _overlap(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    alike = [name for name in header if header[name].get("shape") == header[Q_A]["shape"]]
    first, *_, last = sorted(alike, key=lambda name: int(header[name]["data_offsets"][0]))
    header[last]["data_offsets"] = header[first]["data_offsets"]
    return header, data


def _with(**fields: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    def spoil(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        header[Q_A].update(fields)
        return header, data

    return spoil


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_gap, "gap"),
        (_overlap, "overlap"),
        (lambda header, data: (header, data[:-1]), "describes"),
        (lambda header, data: (header, data + b"\0"), "describes"),
        (_with(dtype="I64"), "I64"),
        (_with(dtype=7), "invalid entry"),
        (_with(dtype="F64", shape=[2, 64]), "F64"),
        (_with(shape=[4, 65]), "takes 1040"),
        (_with(shape=[-4, -64]), "shape"),
        (_with(shape=[4, 64, 1]), "shape"),
        (_with(shape=[True, 256]), "shape"),
        (_with(shape=[1 << 62, 1 << 62]), "shape"),
        (_with(data_offsets=[0, -1]), "offsets"),
        (_with(data_offsets=[0]), "invalid entry"),
        (_with(data_offsets=[1 << 60, 1 << 61]), "offsets"),
        (_with(more=1), "invalid entry"),
        (lambda header, data: ({**header, Q_A: []}, data), "invalid entry"),
        (lambda header, data: ({**header, "__metadata__": []}, data), "metadata"),
        (lambda header, data: ({**header, "__metadata__": {"format": 1}}, data), "metadata"),
    ],
)
def test_hostile_tensor_entries_are_refused_with_the_reason(
    adapter: Path,
    tiny_base: BaseCheckpoint,
    spoil: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]],
    reason: str,
) -> None:
    write_weights(adapter, *spoil(*read_weights(adapter)))
    assert reason in refusal(adapter, tiny_base)


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (b"{}", 1 << 63, "truncated"),
        (b"{}", 200, "truncated"),
        (b"{" + b" " * 10_000_000 + b"}", None, "10000002 bytes"),
        (b"[]", None, "object"),
        (b"not json", None, "JSON"),
        (b'{"a":' * 5000, None, "JSON|deep"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', None, "duplicate key"),
        (b"\xff" * 64, None, "JSON"),
    ],
)
def test_hostile_headers_are_refused_with_the_reason(
    adapter: Path, tiny_base: BaseCheckpoint, header: bytes, length: int | None, reason: str
) -> None:
    write_weights(adapter, header, b"", length)
    message = refusal(adapter, tiny_base)
    assert any(part in message for part in reason.split("|")), message


@pytest.mark.promise("C5")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncated_file_is_refused(adapter: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint, data: Any) -> None:
    content = (tiny_adapter / "adapter_model.safetensors").read_bytes()
    size = data.draw(st.integers(0, len(content) - 1))
    (adapter / "adapter_model.safetensors").write_bytes(content[:size])
    refusal(adapter, tiny_base)


@pytest.mark.promise("C5")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(
    adapter: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint, data: Any
) -> None:
    content = bytearray((tiny_adapter / "adapter_model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(content)
    try:
        lora = read_adapter(adapter, tiny_base).lora
    except AdapterRefused:
        return
    shapes = {name: entry.shape for name, entry in read_safetensors_header(path).items()}
    assert shapes == lora_shapes(tiny_base, lora)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_naming_the_tensor(
    adapter: Path, tiny_base: BaseCheckpoint, dtype: str, value: float
) -> None:
    import torch

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_weights(adapter).items()}
    tensors[Q_A][1, 3] = value
    save_weights(adapter, tensors)
    message = refusal(adapter, tiny_base)
    assert "1 NaN" in message
    assert Q_A in message


def test_largest_finite_values_are_not_taken_for_inf(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    tensors = load_weights(adapter)
    tensors[Q_A][0, 0] = float(np.finfo(np.float32).max)
    save_weights(adapter, tensors)
    read_adapter(adapter, tiny_base)


@pytest.mark.promise("C5")
def test_wrong_rank_missing_and_extra_tensors_are_refused(adapter: Path, tiny_base: BaseCheckpoint) -> None:
    import torch

    tensors = load_weights(adapter)
    set_config(adapter, r=8)
    assert "of shape [4," in refusal(adapter, tiny_base)
    set_config(adapter, r=4)

    save_weights(adapter, {name: value for name, value in tensors.items() if name != Q_A})
    assert f"lacks 1 tensors that its config names, the first is {Q_A!r}" in refusal(adapter, tiny_base)

    save_weights(adapter, {**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)})
    assert "lm_head" in refusal(adapter, tiny_base)

    save_weights(adapter, {**tensors, Q_A: torch.zeros(64, 4)})
    assert "shape [64, 4]" in refusal(adapter, tiny_base)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["self_attn.k_proj", "model.layers.0.mlp.up_proj", "1.mlp.up_proj"]]
)
def test_targets_are_checked_against_the_tensors(adapter: Path, tiny_base: BaseCheckpoint, targets: Any) -> None:
    set_config(adapter, target_modules=targets)
    module_names = set(LLAMA_LINEARS if targets == "all-linear" else {name.rpartition(".")[2] for name in targets})
    save_weights(adapter, {k: v for k, v in load_weights(adapter).items() if k.split(".")[-3] in module_names})
    assert read_adapter(adapter, tiny_base).lora.target_modules == sorted(module_names)

    save_weights(adapter, {k: v for k, v in load_weights(adapter).items() if ".layers.1." not in k})
    assert "layers.1." in refusal(adapter, tiny_base)


def test_adapter_of_a_larger_model_is_refused(adapter: Path, tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    other = tmp_path / "tiny-llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**tiny_base.llama_config(), "num_hidden_layers": 3}))
    assert "layers.2" in refusal(adapter, BaseCheckpoint("tiny-llama", str(other), other, None))
