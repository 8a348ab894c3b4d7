"""`corral adapters show | diff | verify | export` on a registry with a lineage."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.clients.cli.test_cli import assert_one_line_error, corral
from training.base_models.resolve import BaseCheckpoint
from training.registry.manifest import AdapterManifest, Environment, ParentRef, SampleAnswer
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

METRICS = {"eval_loss": 1.25, "base_eval_loss": 2.5, "eval_tokens": 1200.0, "train_s": 75.0, "num_train_tokens": 9000.0}


def register(registry: Path, base: BaseCheckpoint, adapter: Path, **fields: Any) -> AdapterManifest:
    draft = AdapterDraft(name="ranch", base=base, chat_format="chatml", metrics=METRICS, **fields)
    return AdapterPublisher(AdapterRegistry(registry)).register(adapter, draft)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lineage(tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> Path:
    """ranch@1 (sft), and ranch@2 (dpo), which was trained from it."""
    registry = tmp_path / "registry"
    first = register(registry, tiny_base, tiny_adapter, method="sft", config={"seed": 7, "learning_rate": 0.001})
    register(
        registry,
        tiny_base,
        tiny_adapter,
        method="dpo",
        parent=ParentRef(
            name="ranch", version=1, weights_sha256=first.weights_sha256, other_split="its data.split_seed is 3"
        ),
        config={"seed": 7, "learning_rate": 0.002},
        evaluated_sha256=first.weights_sha256,
        environment=Environment(
            code_version="0.1.0", git_commit="abc123", libraries={"torch": "2.13.0"}, devices=["H100", "H100"]
        ),
        samples=[SampleAnswer(prompt="Where is the key?", reference="By the porch.", base="What?", adapter="Porch.")],
    )
    return registry


def adapters(registry: Path, *arguments: str) -> Result:
    return corral("adapters", *arguments, "--registry", str(registry))


def test_show_tells_the_whole_lineage(lineage: Path, tiny_base: BaseCheckpoint) -> None:
    output = adapters(lineage, "show", "ranch@2").stdout
    for words in (
        "dpo, 9,000 tokens, 1:15 min, seed 7",
        "1.2500, the reference's 2.5000, over 1,200 tokens, computed from the published file",
        "0.1.0, commit abc123",
        "torch 2.13.0",
        "2 x H100",
        "learning_rate: 0.002",
        "Where is the key?",
        "Porch.",
    ):
        assert words in output
    tree = output[output.index(tiny_base.source) :]
    assert 0 < tree.index("ranch@1  sft, held-out loss") < tree.index("ranch@2  dpo, held-out DPO loss 1.2500")
    assert "ranch@1 may have been trained on this version's held-out rows: its data.split_seed is 3" in tree
    assert "1.2500 nats, the base's 2.5000, over 1,200 tokens" in adapters(lineage, "show", "ranch@1").stdout
    report = json.loads(adapters(lineage, "show", "ranch@2", "--json").stdout)
    assert [(older["version"], older["method"]) for older in report["ancestors"]] == [(1, "sft")]
    assert report["parent"]["version"] == 1


def test_parent_that_is_gone_is_said_to_be_gone(lineage: Path) -> None:
    AdapterPromoter(AdapterRegistry(lineage)).delete("ranch", 1)
    assert "ranch@1: deleted or replaced since" in adapters(lineage, "show", "ranch").stdout
    assert json.loads(adapters(lineage, "show", "ranch", "--json").stdout)["ancestors"] == []


def test_diff_names_what_differs(lineage: Path) -> None:
    output = adapters(lineage, "diff", "ranch@1", "ranch@2").stdout
    assert "config.learning_rate" in output
    assert "the weights are equal" in output
    compared = json.loads(adapters(lineage, "diff", "ranch@1", "ranch@2", "--json").stdout)
    assert {"key": "method", "a": "sft", "b": "dpo"} in compared["fields"]
    assert compared["weights"]["overall"] == {"module": "all", "relative_change": 0.0, "cosine": 1.0}
    assert_one_line_error(adapters(lineage, "diff", "ranch@1", "ranch@9"), 1, "no version 9")


def test_verify_exits_0_where_all_is_equal_and_1_where_not(lineage: Path) -> None:
    passed = adapters(lineage, "verify", "ranch@2", "--max-tokens", "4")
    assert passed.exit_code == 0, passed.stderr
    assert "the engine's answers match PEFT's" in passed.stdout
    as_json = json.loads(adapters(lineage, "verify", "ranch", "--prompt", "Hi", "--max-tokens", "4", "--json").stdout)
    assert as_json["passed"] is True
    assert [prompt["prompt"] for prompt in as_json["prompts"]] == ["Hi"]
    with (lineage / "ranch/versions/000002/adapter_config.json").open("a") as file:
        file.write(" ")
    assert_one_line_error(adapters(lineage, "verify", "ranch@2"), 1, "adapter_config.json", "sha256")


def test_export_says_what_it_merged_into_and_what_that_costs(lineage: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    result = adapters(lineage, "export", "ranch", "--merged", str(target))
    assert result.exit_code == 0, result.stderr
    assert "dequantized NF4 weights" in result.stdout
    assert "served (NF4 base, adapter unmerged)" in result.stdout
    assert json.loads((target / "corral_export.json").read_text())["onto"] == "nf4"
    assert_one_line_error(adapters(lineage, "export", "ranch", "--merged", str(target)), 1, "is not empty")
    assert_one_line_error(adapters(lineage, "export", "ranch"), 1, "--merged DIR, --gguf FILE")
    assert_one_line_error(adapters(lineage, "export", "ranch", "--gguf", "x", "--gguf-type", "Q2"), 2, "Q2")
    text = tmp_path / "a.txt"
    text.write_text("Some text to measure on.")
    original = ["export", "ranch", "--gguf", str(tmp_path / "a.gguf"), "--onto", "original", "--eval", str(text)]
    record = json.loads(adapters(lineage, *original, "--json").stdout)
    assert (record["onto"], record["gguf_type"], record["merged_loss"]) == ("original", "F16", None)
    assert record["gguf_loss"] != record["served_loss"]
