"""The gate on registration: an adapter must change something, be good enough, and be the one that was evaluated."""

import json
import shutil
from pathlib import Path

import pytest

from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused
from training.registry.gate import rejection_reason
from training.registry.manifest import AdapterManifest, Environment, ParentRef, SampleAnswer
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

GOOD = {"eval_loss": 1.0, "base_eval_loss": 2.0}


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")


@pytest.fixture
def zero_adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """As PEFT leaves it before the first step: A random, B zero."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "zero"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    # -0.0 is zero too
    save_file({name: t * -0.0 if "lora_B" in name else t for name, t in tensors.items()}, weights, {"format": "pt"})
    return folder


def draft(base: BaseCheckpoint, metrics: dict[str, float] = GOOD, **changes: object) -> AdapterDraft:
    return AdapterDraft(name="ranch", base=base, chat_format="chatml", metrics=metrics, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("eval_loss", "min_improvement", "passes"),
    [
        (2.0, 0.0, True),  # no worse
        (2.0 + 1e-9, 0.0, False),
        (1.5, 0.5, True),  # nats, whatever the base's loss is
        (1.5 + 1e-9, 0.5, False),
        (1.2, 0.8, True),
        (0.5, 1.5, True),
        (0.5, 1.6, False),
        (float("nan"), 0.0, False),
        (float("-inf"), 0.0, False),
    ],
)
def test_min_improvement_is_in_nats_below_the_bases_loss(
    eval_loss: float, min_improvement: float, passes: bool
) -> None:
    metrics = {"eval_loss": eval_loss, "base_eval_loss": 2.0}
    assert (rejection_reason(metrics, min_improvement, changes=True) is None) is passes


def test_continuation_worse_than_its_parent_is_refused_though_better_than_the_base() -> None:
    for eval_loss, passes in ((1.2, True), (1.2 + 1e-9, False), (1.1, True), (1.9, False)):
        metrics = {"eval_loss": eval_loss, "base_eval_loss": 2.0, "parent_eval_loss": 1.2}
        assert (rejection_reason(metrics, 0.0, changes=True) is None) is passes
    message = str(
        rejection_reason({"eval_loss": 1.9, "base_eval_loss": 2.0, "parent_eval_loss": 1.2}, 0.0, changes=True)
    )
    assert "its held-out loss is 1.9000, above the 1.2000 of the version that it continues" in message
    lost = {"eval_loss": 1.0, "base_eval_loss": 2.0, "parent_eval_loss": float("nan")}
    assert rejection_reason(lost, 0.0, changes=True) is not None


def test_force_past_the_parents_loss_is_recorded(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    worse = draft(tiny_base, {**GOOD, "parent_eval_loss": 0.5})
    with pytest.raises(AdapterRefused, match=r"above the 0\.5000 of the version that it continues"):
        AdapterPublisher(registry).register(tiny_adapter, worse)
    assert registry.names() == []
    manifest = AdapterPublisher(registry).register(tiny_adapter, worse, force=True)
    assert manifest.forced
    assert "above the 0.5000" in str(manifest.forced_because)


def test_adapter_of_zeros_is_refused_from_its_tensors_whatever_its_figures_say(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, zero_adapter: Path
) -> None:
    with pytest.raises(AdapterRefused, match="it changes nothing"):
        AdapterPublisher(registry).register(zero_adapter, draft(tiny_base))
    assert registry.names() == []
    manifest = AdapterPublisher(registry).register(zero_adapter, draft(tiny_base), force=True)
    assert manifest.forced
    assert registry.manifest("ranch", 1).forced_because == manifest.forced_because
    assert "changes nothing" in str(manifest.forced_because)


def test_one_layer_that_is_not_zero_is_a_change(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, zero_adapter: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = zero_adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    trained = load_file(tiny_adapter / weights.name)[name]
    save_file({**load_file(weights), name: trained}, weights, {"format": "pt"})
    assert not AdapterPublisher(registry).register(zero_adapter, draft(tiny_base)).forced


def test_adapter_that_changed_no_output_is_refused(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    with pytest.raises(AdapterRefused, match="changes nothing"):
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base, changes=False))


def test_other_weights_than_those_evaluated_are_refused_also_by_force(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    for force in (False, True):
        with pytest.raises(AdapterRefused, match="evaluated abcabcabcabc"):
            AdapterPublisher(registry).register(
                tiny_adapter, draft(tiny_base, evaluated_sha256="abc" * 22), force=force
            )
    assert registry.names() == []
    sha256 = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base)).weights_sha256
    assert (
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base, evaluated_sha256=sha256)).evaluated_sha256
        == sha256
    )


def test_lineage_is_recorded(registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> None:
    first = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    assert (first.parent, first.environment, first.samples, first.method) == (None, None, [], None)
    lineage = {
        "parent": ParentRef(name="ranch", version=1, weights_sha256=first.weights_sha256),
        "method": "dpo",
        "environment": Environment(code_version="0.1", git_commit=None, libraries={"peft": "1"}, devices=["a CPU"]),
        "samples": [SampleAnswer(prompt="p", reference="r", base="b", adapter="a")],
    }
    second = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base, **lineage))
    read = registry.manifest("ranch", 2)
    assert read == second
    assert {key: getattr(read, key) for key in lineage} == lineage


def test_manifests_of_schema_version_1_are_read(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    path = registry.fetch(AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))) / "manifest.json"
    fields = json.loads(path.read_text())
    added = ["forced_because", "evaluated_sha256", "method", "parent", "environment", "samples"]
    old = {key: value for key, value in fields.items() if key not in added} | {"schema_version": 1}
    path.write_text(json.dumps(old))
    manifest = registry.resolve("ranch")
    assert isinstance(manifest, AdapterManifest)
    assert (manifest.schema_version, manifest.metrics, manifest.samples) == (1, GOOD, [])
