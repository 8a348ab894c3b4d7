"""`corral adapters verify`: PEFT and the engine side by side, and damage that it must find."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.verify import TOLERANCE, Comparison, _compare, verify
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused
from training.export.peft_reference import Continuation
from training.registry.manifest import AdapterManifest, SampleAnswer
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")


@pytest.fixture
def manifest(registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> AdapterManifest:
    draft = AdapterDraft(
        name="ranch",
        base=tiny_base,
        chat_format="chatml",
        metrics={"eval_loss": 1.0, "base_eval_loss": 2.0},
        samples=[SampleAnswer(prompt=prompt, reference="", base="", adapter="") for prompt in ("Hi", "Where is it?")],
    )
    return AdapterPublisher(registry).register(tiny_adapter, draft)


@pytest.mark.promise("E2", "E4")
def test_engine_and_peft_give_the_same_tokens_and_log_probabilities(
    registry: AdapterRegistry, manifest: AdapterManifest
) -> None:
    compared = verify(registry, manifest, [], max_tokens=12)
    assert [one.prompt for one in compared] == ["Hi", "Where is it?"]
    for one in compared:
        assert one.passed
        assert one.max_difference < TOLERANCE
        assert one.num_tokens > 8
    assert compared[0].answer != compared[1].answer
    (report,) = verify(registry, manifest, ["Hi"], max_tokens=4)
    assert report.passed
    assert compared[0].answer.startswith(report.answer)


def test_another_adapter_in_the_engine_than_peft_has_is_found(
    registry: AdapterRegistry, manifest: AdapterManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deployments.engine import engine

    right = engine.Engine.lora_weights
    monkeypatch.setattr(
        engine.Engine, "lora_weights", lambda self, tensors, scaling: right(self, tensors, scaling * 1.05)
    )
    assert not any(one.passed for one in verify(registry, manifest, [], max_tokens=4))


@pytest.mark.promise("C4")
def test_changed_weights_are_refused_before_anything_is_loaded(
    registry: AdapterRegistry, manifest: AdapterManifest
) -> None:
    weights = registry.fetch(manifest) / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(AdapterRefused, match="its manifest says"):
        verify(registry, manifest, [], max_tokens=4)


def test_base_that_moved_away_is_named(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    from training.base_models.nf4 import Quantization
    from training.export.peft_reference import load_with_peft

    moved = Path(shutil.copytree(tiny_base.path, tmp_path / "tiny-llama"))
    draft = AdapterDraft(
        name="ranch",
        base=BaseCheckpoint("tiny-llama", str(moved), moved, None),
        chat_format="chatml",
        metrics={"eval_loss": 1.0, "base_eval_loss": 2.0},
    )
    folder = registry.fetch(AdapterPublisher(registry).register(tiny_adapter, draft))
    shutil.rmtree(moved)
    with pytest.raises(AdapterRefused, match="base_model_name_or_path"):
        load_with_peft(folder, Quantization(), torch.device("cpu"))


def test_comparison_covers_tokens_their_end_and_log_probabilities() -> None:
    peft = Continuation([5, 6], [-1.0], [-0.5, -0.25], stopped=True)

    def against(*, tokens: list[int], logprobs: list[float], stopped: bool = True) -> Comparison:
        return _compare("p", "a", peft, Continuation(tokens, [-1.0], logprobs, stopped))

    assert against(tokens=[5, 6], logprobs=[-0.5, -0.2505]).passed
    assert not against(tokens=[5, 6], logprobs=[-0.5, -0.252]).passed
    assert not against(tokens=[5, 6], logprobs=[-0.5, -0.25], stopped=False).passed
    other = against(tokens=[5, 7], logprobs=[-0.5, -9.0])
    assert not other.same_tokens
    assert (other.max_difference, other.num_tokens) == (0.0, 2)  # what follows a different token is not comparable
