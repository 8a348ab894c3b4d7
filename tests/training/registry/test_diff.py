"""What differs between two adapter versions, against the dense matrices that are never built."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.base_models.llama_shape import LLAMA_LINEARS
from training.base_models.resolve import BaseCheckpoint
from training.registry.adapter_files import LoraParams
from training.registry.diff import WeightChange, diff_manifests, diff_weights
from training.registry.manifest import DatasetRef, Environment
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

LORA = LoraParams(r=4, lora_alpha=8, target_modules=sorted(LLAMA_LINEARS))


def changed(adapter: Path, folder: Path, noise: float) -> Path:
    torch.manual_seed(7)
    copy = Path(shutil.copytree(adapter, folder))
    tensors = load_file(copy / "adapter_model.safetensors")
    noisy = {name: tensor + noise * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(noisy, copy / "adapter_model.safetensors")
    return copy


def dense(folder: Path, lora: LoraParams) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.partition(".lora_A.")[0] for name in tensors if ".lora_A." in name]
    return {
        name.removeprefix("base_model.model.model."): lora.scaling
        * tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def test_norms_and_cosine_are_those_of_the_dense_matrices(tiny_adapter: Path, tmp_path: Path) -> None:
    other, other_lora = changed(tiny_adapter, tmp_path / "b", 0.03), LORA.model_copy(update={"lora_alpha": 12})
    diff = diff_weights(tiny_adapter, LORA, other, other_lora)
    a, b = dense(tiny_adapter, LORA), dense(other, other_lora)
    assert {module.module for module in diff.modules} == a.keys()
    for module in diff.modules:
        w_a, w_b = a[module.module], b[module.module]
        assert module.relative_change == pytest.approx(float((w_b - w_a).norm() / w_a.norm()), rel=1e-9)
        assert module.cosine == pytest.approx(float((w_a * w_b).sum() / w_a.norm() / w_b.norm()), rel=1e-9)
    all_a, all_b = (torch.cat([w[name].flatten() for name in a]) for w in (a, b))
    assert diff.overall.relative_change == pytest.approx(float((all_b - all_a).norm() / all_a.norm()), rel=1e-9)
    assert diff.overall.cosine == pytest.approx(float(all_a @ all_b / all_a.norm() / all_b.norm()), rel=1e-9)
    changes = [module.relative_change or 0 for module in diff.modules]
    assert changes == sorted(changes, reverse=True)


def test_other_factors_of_the_same_update_are_no_change(tiny_adapter: Path, tmp_path: Path) -> None:
    assert diff_weights(tiny_adapter, LORA, tiny_adapter, LORA).overall == WeightChange("all", 0.0, 1.0)
    copy = Path(shutil.copytree(tiny_adapter, tmp_path / "b"))
    tensors = load_file(copy / "adapter_model.safetensors")
    doubled = {name: tensor * (2 if "lora_A" in name else 0.5) for name, tensor in tensors.items()}
    save_file(doubled, copy / "adapter_model.safetensors")
    overall = diff_weights(tiny_adapter, LORA, copy, LORA).overall
    assert overall.relative_change == pytest.approx(0, abs=1e-7)
    assert overall.cosine == pytest.approx(1)


def test_module_that_one_side_does_not_adapt_counts_as_zero_there(tiny_adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_adapter, tmp_path / "b"))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name},
        copy / "adapter_model.safetensors",
    )
    lost = next(m for m in diff_weights(tiny_adapter, LORA, copy, LORA).modules if "up_proj" in m.module)
    assert lost == WeightChange("layers.1.mlp.up_proj", 1.0, None)
    gained = diff_weights(copy, LORA, tiny_adapter, LORA).modules[0]
    assert gained == WeightChange("layers.1.mlp.up_proj", None, None)


def test_fields_that_differ_are_named_with_both_values(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = AdapterRegistry(tmp_path)

    def register(rate: float, loss: float, sha256: str, peft: str):  # type: ignore[no-untyped-def]
        draft = AdapterDraft(
            name="ranch",
            base=tiny_base,
            chat_format="chatml",
            metrics={"eval_loss": loss, "base_eval_loss": 2.0},
            dataset=DatasetRef(sources=["a.jsonl"], sha256=sha256, num_rows=9, num_held_out=1),
            config={"learning_rate": rate, "lora": {"r": 4}},
            environment=Environment(code_version="1", git_commit=None, libraries={"peft": peft}, devices=["CPU"]),
        )
        return AdapterPublisher(registry).register(tiny_adapter, draft)

    one, two, three = register(1e-3, 1.0, "a", "1"), register(2e-3, 1.5, "b", "2"), register(1e-3, 1.0, "a", "1")
    assert [(change.key, change.a, change.b) for change in diff_manifests(one, two)] == [
        ("dataset.sha256", "a", "b"),
        ("config.learning_rate", 1e-3, 2e-3),
        ("metrics.eval_loss", 1.0, 1.5),
        ("environment.libraries.peft", "1", "2"),
    ]
    assert diff_manifests(one, three) == []
