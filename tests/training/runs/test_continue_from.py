"""Training from a registered adapter: the same outputs at step 0, LoRA parameters, base, and DPO reference."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from training.__main__ import run_training
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.chat.default_system import DefaultSystem
from training.chat.detect import configured_default_system
from training.config.train_config import LoraSettings, TrainConfig
from training.data.run_inputs import read_inputs
from training.errors import AdapterNotFound, AdapterRefused, ConfigError
from training.registry.manifest import AdapterManifest, ParentRef
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry
from training.runs.continue_from import copy_parent, parent_ref, resolve_parent_adapter, with_warning
from training.runs.run_dir import RunDir
from training.trainer.callback import TrainingCallback
from training.trainer.preference_losses import ScoredPairs, completion_logps
from training.trainer.preference_trainer import preference_trainer
from training.trainer.qlora import exact_adapters, start_adapter
from training.trainer.train import _trainer, step_batches, train, training_arguments

IDS = torch.tensor([[3, 50, 700, 12, 9, 4000, 31, 8]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    """A Ray of the test's own, with a short socket path, gone afterwards."""
    import ray

    temp_dir = f"/tmp/corral-p{os.getpid()}"
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, _temp_dir=temp_dir)
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")


@pytest.fixture
def parent(registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> AdapterManifest:
    """tiny-hand@1: LoRA r 4, alpha 8, not zero; trained elsewhere, hence forced."""
    draft = AdapterDraft(name="tiny-hand", base=tiny_base, chat_format="chatml")
    return AdapterPublisher(registry).register(tiny_adapter, draft, force=True)


def config_of(tiny_base: BaseCheckpoint, tmp_path: Path, **changes: Any) -> TrainConfig:
    rows = [{"prompt": f"Ask {n}", "chosen": f"Answer {n % 3}.", "rejected": "No."} for n in range(20)]
    if changes.get("method", "sft") == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(tiny_base.path),
            "adapter": "tiny-hand",
            "continue_from": "tiny-hand",
            "data": {"path": str(path), "held_out": 0.2},
            "quantization": {"compute_dtype": "float32"},
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "max_length": 64,
            "sample_prompts": 0,
            **changes,
        }
    )


def test_version_shape_and_format_are_written_out(
    registry: AdapterRegistry, parent: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    AdapterPromoter(registry).promote("tiny-hand", 1, "stable")
    config = config_of(tiny_base, tmp_path, continue_from="tiny-hand@stable", lora={"lora_dropout": 0.3})
    resolved, resolved_parent = resolve_parent_adapter(config, tiny_base, registry)
    assert resolved_parent == parent
    assert resolved.continue_from == "tiny-hand@1"
    assert (resolved.lora.r, resolved.lora.lora_alpha, resolved.lora.lora_dropout) == (4, 8, 0.3)
    assert resolved.chat_format == "chatml"
    assert resolve_parent_adapter(resolved, tiny_base, registry)[0] == resolved
    assert TrainConfig.model_validate(resolved.model_dump(mode="json")) == resolved
    unparented = config.model_copy(update={"continue_from": None})
    assert resolve_parent_adapter(unparented, tiny_base, registry) == (unparented, None)


def split_between(
    registry: AdapterRegistry, base: BaseCheckpoint, adapter: Path, parents: TrainConfig, childs: TrainConfig
) -> tuple[str | None, list[str]]:
    """The split that the registry records, and the report's warnings, where a run continues from `parents`."""
    trained_on = read_inputs(parents).dataset
    draft = AdapterDraft(
        name="known", base=base, chat_format="chatml", dataset=trained_on, config=parents.model_dump(mode="json")
    )
    parent = AdapterPublisher(registry).register(adapter, draft, force=True)
    inputs = read_inputs(childs)
    warned = with_warning(inputs, childs, parent).report.warnings
    return parent_ref(childs, inputs.dataset, parent).other_split, [
        w for w in warned if w not in inputs.report.warnings
    ]


def test_parent_with_the_same_split_knows_no_held_out_row(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    parents = config_of(tiny_base, tmp_path, seed=0)
    smaller = {**parents.data.model_dump(), "held_out": 0.1}
    for childs in (config_of(tiny_base, tmp_path, seed=9), config_of(tiny_base, tmp_path, data=smaller)):
        before, now = (read_inputs(config).held_out_samples for config in (parents, childs))
        assert {row.source for row in now} <= {row.source for row in before}
        assert split_between(registry, tiny_base, tiny_adapter, parents, childs) == (None, [])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"split_seed": 1}, "its data.split_seed is 0, not 1"),
        ({"held_out": 0.5}, "it held out 4 rows, not 10"),
        ({"path": "other.jsonl"}, "its data has sha256 "),
    ],
)
def test_parent_that_may_know_held_out_rows_is_warned_of_in_one_line(
    registry: AdapterRegistry,
    tiny_base: BaseCheckpoint,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    parents = config_of(tiny_base, tmp_path)
    childs = config_of(tiny_base, tmp_path, data={**parents.data.model_dump(), **data})
    recorded, (warning,) = split_between(registry, tiny_base, tiny_adapter, parents, childs)
    assert recorded is not None
    assert recorded.startswith(reason)
    assert (
        f"known@1, from which training continues, may have been trained on rows that are now held out: {reason}"
        in warning
    )
    assert "\n" not in warning


def test_parent_of_unknown_data_is_warned_of_unless_nothing_is_held_out(
    parent: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    config = config_of(tiny_base, tmp_path)
    dataset = read_inputs(config).dataset
    assert parent_ref(config, dataset, parent).other_split == "its training data is not recorded"
    assert parent_ref(config, dataset.model_copy(update={"num_held_out": 0}), parent).other_split is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 8}}, "lora.r is 8, but continue_from tiny-hand@1 has 4: leave lora.r out"),
        ({"lora": {"target_modules": ["q_proj"]}}, r"lora.target_modules is \['q_proj'\], but .* has \['down_proj'"),
        ({"lora": {"use_rslora": True}}, "lora.use_rslora is True, but continue_from tiny-hand@1 has False"),
        ({"chat_format": "llama-3"}, "chat_format is 'llama-3', but continue_from tiny-hand@1 has 'chatml'"),
        ({"quantization": {"double_quant": False}}, "quantization.double_quant is False, but .* has True"),
    ],
)
def test_contradiction_is_refused_naming_both(
    registry: AdapterRegistry,
    parent: AdapterManifest,
    tiny_base: BaseCheckpoint,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message) as exc_info:
        resolve_parent_adapter(config_of(tiny_base, tmp_path, **changes), tiny_base, registry)
    assert "\n" not in str(exc_info.value)


def test_unknown_parent_and_another_base_are_refused(
    registry: AdapterRegistry,
    parent: AdapterManifest,
    tiny_base: BaseCheckpoint,
    embedded_base: BaseCheckpoint,
    tmp_path: Path,
) -> None:
    with pytest.raises(AdapterNotFound, match="tiny-hnd"):
        resolve_parent_adapter(config_of(tiny_base, tmp_path, continue_from="tiny-hnd"), tiny_base, registry)
    with pytest.raises(AdapterRefused, match="was trained on base 'tiny-llama' and not 'smollm2-135m'"):
        resolve_parent_adapter(config_of(tiny_base, tmp_path), embedded_base, registry)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_outputs_at_step_0_are_the_parents_bit_for_bit(
    registry: AdapterRegistry, parent: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path, method: str
) -> None:
    from peft import PeftModel

    config, _ = resolve_parent_adapter(config_of(tiny_base, tmp_path, method=method), tiny_base, registry)
    served = PeftModel.from_pretrained(load_quantized(tiny_base, config.quantization), str(registry.fetch(parent)))
    copy_parent(parent, RunDir(tmp_path, "run"), registry)
    model = start_adapter(
        load_quantized(tiny_base, config.quantization), config.lora, parent_dir=tmp_path / "run" / "parent"
    )
    weights = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())

    callback = TrainingCallback(config, cast(Any, None), 10, "")
    trainer = _trainer(config, read_inputs(config), model, callback, tmp_path / "scratch")  # TRL rounds to bfloat16
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(IDS).logits, served.eval()(IDS).logits)
    after = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_dpo_is_measured_against_the_parent_or_the_base(
    registry: AdapterRegistry, parent: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path, reference: str
) -> None:
    config = config_of(tiny_base, tmp_path, method="dpo", preference={"reference": reference})
    config, _ = resolve_parent_adapter(config, tiny_base, registry)
    inputs = read_inputs(config)
    rows = inputs.train_rows
    model = start_adapter(
        load_quantized(tiny_base, config.quantization), config.lora, parent_dir=registry.fetch(parent)
    )
    batches, layout = step_batches(config, inputs, 0, 1)
    arguments = training_arguments(config, model, tmp_path / "scratch", layout.accumulation)
    trainer = preference_trainer(config, inputs, model, batches, arguments, [])
    with_parent = completion_logps(model, ScoredPairs(rows)).chunk(2)[0]
    with model.disable_adapter():
        of_base = completion_logps(model, ScoredPairs(rows)).chunk(2)[0]
    assert (with_parent - of_base).abs().max() > 0.1
    expected = with_parent if reference == "initial" else of_base
    assert [row["ref_chosen_logps"] for row in trainer.train_dataset] == pytest.approx(expected.tolist(), abs=1e-4)
    (batch, *_), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    loss = float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["size"]).detach())
    assert (loss == pytest.approx(math.log(2), abs=1e-4)) == (reference == "initial")


def test_continued_run_reports_what_the_parent_had(
    registry: AdapterRegistry, parent: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    config, _ = resolve_parent_adapter(config_of(tiny_base, tmp_path, learning_rate=1e-2), tiny_base, registry)
    from tests.training.trainer.test_preferences import Recorder

    result = train(
        config,
        Recorder(),
        adapter_dir=tmp_path / "adapter",
        scratch_dir=tmp_path / "scratch",
        device=torch.device("cpu"),
        parent_dir=registry.fetch(parent),
    )
    assert result.metrics["eval_loss"] < result.metrics["parent_eval_loss"]
    assert result.metrics["parent_eval_loss"] != pytest.approx(result.metrics["base_eval_loss"], abs=1e-3)
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = load_file(registry.fetch(parent) / "adapter_model.safetensors")
    assert trained.keys() == before.keys()
    assert not all(torch.equal(trained[name], before[name]) for name in trained)


def test_exact_adapters_gives_back_what_the_block_rounds(tiny_base: BaseCheckpoint) -> None:
    model = start_adapter(load_quantized(tiny_base, Quantization()), LoraSettings(r=4))
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    with exact_adapters(model):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.bfloat16()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
def test_dpo_on_two_workers_becomes_the_next_version_of_its_parent(
    ray_cluster: None, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))  # of this process only: workers have the run's directory
    draft = AdapterDraft(name="tiny-hand", base=tiny_base, chat_format="chatml")
    parent = AdapterPublisher(AdapterRegistry()).register(tiny_adapter, draft, force=True)
    config = config_of(
        tiny_base,
        tmp_path,
        method="dpo",
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        num_workers=2,
        use_gpu=False,
        resources_per_worker={"CPU": 1},
        storage_path=str(tmp_path / "runs"),
    )
    manifest = run_training(config)
    assert (manifest.version, manifest.method) == (2, "dpo")
    assert manifest.parent == ParentRef(
        name="tiny-hand",
        version=1,
        weights_sha256=parent.weights_sha256,
        other_split="its training data is not recorded",
    )
    assert manifest.config is not None
    assert manifest.config["continue_from"] == "tiny-hand@1"
    assert manifest.lora == parent.lora
    assert manifest.metrics["eval_reward_margin"] > 0
    assert manifest.metrics["eval_loss"] < manifest.metrics["base_eval_loss"]
    assert manifest.metrics["base_eval_loss"] == pytest.approx(math.log(2))


@pytest.mark.promise("F5")
def test_run_keeps_the_system_text_of_its_parent(
    registry: AdapterRegistry, parent: AdapterManifest, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    def continued(name: str, **chat: str) -> TrainConfig:
        config = config_of(tiny_base, tmp_path, continue_from=name, chat=chat)
        resolved, _ = resolve_parent_adapter(config, tiny_base, registry)
        assert resolve_parent_adapter(resolved, tiny_base, registry)[0] == resolved
        return resolved

    of_template = configured_default_system("template", "chatml", tiny_base)
    for name, recorded in (("default", of_template), ("brief", DefaultSystem("Be brief."))):
        draft = AdapterDraft(name=name, base=tiny_base, chat_format="chatml", default_system=recorded)
        AdapterPublisher(registry).register(tiny_adapter, draft, force=True)
        assert read_inputs(continued(name)).chat_format.default_system == recorded
    # Before it was recorded, nothing was added.
    assert parent.default_system is None
    assert continued("tiny-hand").chat.default_system == "none"
    assert continued("default", default_system="template").chat.default_system == "template"
    for name, setting, has in (("tiny-hand", "template", "none"), ("brief", "none", "Be brief.")):
        with pytest.raises(ConfigError, match=f"chat.default_system is '{setting}', but continue_from .* has '{has}'"):
            continued(name, default_system=setting)


@pytest.mark.promise("F5")
def test_parent_whose_template_has_changed_is_refused(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    recorded = DefaultSystem("", "Today Date: yesterday\n\n")
    draft = AdapterDraft(name="dated", base=tiny_base, chat_format="chatml", default_system=recorded)
    AdapterPublisher(registry).register(tiny_adapter, draft, force=True)
    with pytest.raises(ConfigError, match=r"dated@1 was trained with a system text that the chat template in .* not"):
        resolve_parent_adapter(config_of(tiny_base, tmp_path, continue_from="dated"), tiny_base, registry)
