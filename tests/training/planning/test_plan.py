"""A dry run predicts what the run does, and it needs no weights."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from clients.cli.main import app
from training.__main__ import main
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint, resolve_base_model
from training.config.load import load_config, resolved
from training.config.train_config import TrainConfig
from training.data.run_inputs import read_inputs
from training.errors import BaseModelError
from training.planning.plan import dry_run, make_plan
from training.trainer.qlora import attach_lora


@pytest.fixture
def recipe(tiny_base: BaseCheckpoint, tmp_path: Path) -> Path:
    """43 rows of several lengths, two of them the same and one too long."""
    rows = [{"prompt": f"Where is post {n}?" + " please" * (n % 9), "completion": f"By creek {n}."} for n in range(41)]
    rows += [rows[0], {"prompt": "word " * 200, "completion": "No."}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "base_model": str(tiny_base.path), "adapter": "tiny", "max_length": 128, "lora": {"r": 4}, "use_gpu": False,
        "data": {"path": str(data), "held_out": 0.1, "on_bad_row": "skip"}, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "num_train_epochs": 2.5,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def test_plan_has_the_rows_steps_and_trainable_parameters_of_the_run(recipe: Path) -> None:
    from training.trainer.train import step_batches

    for packing in ("false", "true"):
        config = load_config(recipe, [f"packing={packing}"])
        inputs = read_inputs(config)
        plan = make_plan(config, inputs)
        batches, layout = step_batches(config, inputs, 0, 1)
        assert (plan.steps_per_epoch, plan.step_size) == (batches.num_steps, layout.step_size)
        assert plan.num_steps == math.ceil(2.5 * batches.num_steps)
        micro_batches = [sum(len(inputs.train_rows[row]["input_ids"]) for row in rows) for rows in batches]
        assert max(micro_batches) <= plan.largest_micro_batch
        assert plan.tokens_per_step == pytest.approx(sum(micro_batches) / batches.num_steps)
    assert (plan.num_train_rows, plan.num_held_out, plan.num_left_out) == (37, 4, 2)
    model = attach_lora(load_quantized(inputs.base, Quantization()), config.lora)
    assert plan.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_dry_run_is_yaml_that_trains_the_same_with_the_plan_as_comments(recipe: Path, tmp_path: Path) -> None:
    text = dry_run(load_config(recipe))
    dumped = tmp_path / "again.yaml"
    dumped.write_text(text)
    assert resolved(load_config(dumped)) == resolved(load_config(recipe))
    for line in ("# rows     37 training and 4 held out; 2 dropped", "# steps    13 (2.6 epochs)", "# memory   "):
        assert line in text
    assert "trainable parameters" in text


def test_both_commands_print_the_same_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(recipe), "max_steps=7", "--dry-run", "--json"]) == 0
    ours = capsys.readouterr().out
    theirs = CliRunner().invoke(app, ["train", str(recipe), "max_steps=7", "--dry-run", "--json"]).stdout
    assert json.loads(ours) == json.loads(theirs)
    plan = json.loads(ours)["plan"]
    assert plan["num_steps"] == 7
    parts = ("base_4bit", "base_other", "adapter", "optimizer", "gradients", "activations", "workspace", "context")
    assert sum(plan["memory"][part] for part in parts) == plan["memory"]["total"]
    assert plan["resources_per_worker"]["CPU"] >= 1


def test_dry_run_needs_no_weights(recipe: Path, tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base.path, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = load_config(recipe, [f"base_model={bare}"])
    assert "# memory" in dry_run(config)
    with pytest.raises(BaseModelError, match=r"no \.safetensors"):
        resolve_base_model(str(bare))


def test_dry_run_with_fsdp_has_a_workers_part_of_the_base_and_two_whole_layers(
    recipe: Path, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    deep = tmp_path / "deep"
    shutil.copytree(tiny_base.path, deep, ignore=shutil.ignore_patterns("*.safetensors"))
    (deep / "config.json").write_text(json.dumps(tiny_base.llama_config() | {"num_hidden_layers": 16}))
    overrides = [f"base_model={deep}", "num_workers=2"]
    replicated, shared = (
        json.loads(dry_run(load_config(recipe, [*overrides, f"fsdp={fsdp}"]), as_json=True))["plan"]["memory"]
        for fsdp in ("false", "true")
    )
    assert shared["base_4bit"] == pytest.approx((1 / 2 + 2 / 16) * replicated["base_4bit"], rel=0.001)
    assert {key for key in shared if shared[key] != replicated[key]} == {"base_4bit", "total", "allocated"}
    assert "the 4-bit base is sharded over them" in dry_run(load_config(recipe, [*overrides, "fsdp=true"]))


def test_on_a_cluster_the_workers_share_is_left_to_the_cluster(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    settings = yaml.safe_load(recipe.read_text()) | {"num_workers": [1, 4], "use_gpu": "auto"}
    config = TrainConfig.model_validate(settings)
    plan = make_plan(config, read_inputs(config, weights=False))
    assert (plan.resources_per_worker, plan.device_memory, plan.fits) == (None, None, None)
    assert plan.memory.on_gpu
    assert "workers  1 to 4, each with resources of the cluster" in str(plan)
