"""An exported model matches its record: merged weights, GGUF, losses, and files that are complete or absent."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from training.base_models.llama_shape import LLAMA_LINEARS
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint, resolve_base_model
from training.chat.detect import load_chat_format
from training.chat.messages import Message
from training.config.train_config import TrainConfig
from training.data.run_inputs import read_inputs
from training.errors import CorralError, ExportError
from training.export.export import ExportPaths, ExportRecord, export
from training.export.gguf import GgufType, llama_3_rope_factors, write_gguf
from training.export.gguf_vocabulary import read_vocabulary
from training.export.losses import EvaluationRows, evaluation_rows
from training.export.merge import MergeBase, MergedWeights
from training.registry.adapter_files import LoraParams
from training.registry.manifest import AdapterManifest, SampleAnswer
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry
from training.trainer.evaluate import num_labelled

PROJECT = Path(__file__).parents[3]
CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 900, 41, 3000, 17, 20, 8, 2]])
NO_ROWS = EvaluationRows([], "nothing")
FLOAT32 = Quantization(compute_dtype="float32")

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
        quantization=FLOAT32,
        metrics={"eval_loss": 1.0, "base_eval_loss": 2.0},
        samples=[SampleAnswer(prompt="Where is the key?", reference="By the porch.", base="?", adapter="?")],
    )
    return AdapterPublisher(registry).register(tiny_adapter, draft)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=IDS).logits.float()
    return output


def run(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    base: BaseCheckpoint,
    targets: ExportPaths,
    onto: MergeBase = "nf4",
    rows: EvaluationRows = NO_ROWS,
) -> ExportRecord:
    return export(manifest, registry.fetch(manifest), base, targets, onto=onto, rows=rows, device=CPU)


# Merging


@pytest.mark.promise("E2")
def test_nf4_is_what_the_served_base_holds(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, manifest: AdapterManifest
) -> None:
    """Without an update, the dequantized weights are bit for bit those of the loaded base's linears."""
    no_update = manifest.lora.model_copy(update={"lora_alpha": 0})
    merged = MergedWeights(tiny_base, tiny_adapter, no_update, Quantization(), "nf4")
    served = load_quantized(tiny_base, Quantization(compute_dtype="bfloat16"))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        weight: Any = served.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(merged.tensor(name), dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16))
    embedding = merged.tensor("model.embed_tokens.weight")
    assert torch.equal(embedding, served.get_input_embeddings().weight.data)


@pytest.mark.parametrize("onto", ["nf4", "original"])
def test_merged_folder_gives_the_logits_of_base_and_adapter(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path, onto: MergeBase
) -> None:
    run(registry, manifest, tiny_base, ExportPaths(tmp_path / "merged", None), onto)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if onto == "nf4":
        base = load_quantized(tiny_base, FLOAT32)
    else:
        base = LlamaForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, registry.fetch(manifest)))
    # the rounding of the merged weights to bfloat16 is far less than the effect of the adapter
    deviation = (logits(merged) - expected).abs().mean()
    assert deviation < 0.02 * (plain - expected).abs().mean()


def test_sharded_base_keeps_its_shards(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    sharded = tmp_path / "tiny-llama"
    LlamaForCausalLM.from_pretrained(tiny_base.path).save_pretrained(sharded, max_shard_size="2MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base.path / name, sharded / name)
    run(registry, manifest, tiny_base, ExportPaths(tmp_path / "one", None))
    run(registry, manifest, resolve_base_model(str(sharded)), ExportPaths(tmp_path / "many", None))
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 1
    one, many = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))


@pytest.mark.promise("F5")
@pytest.mark.parametrize("setting", ["none", "template", "Be \\ 'brief'."])
def test_folder_asks_as_the_adapter_was_trained_and_stops_where_it_stops(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path, setting: str
) -> None:
    chat_format = load_chat_format("chatml", tiny_base, default_system=setting)
    trained = manifest.model_copy(update={"default_system": chat_format.default_system})
    run(registry, trained, tiny_base, ExportPaths(tmp_path / "merged", None))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    dialog = [Message("user", "a"), Message("assistant", "b"), Message("user", "Where is the key?")]
    plain = [{"role": message.role, "content": message.content} for message in dialog]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert ids == chat_format.render_prompt(dialog)
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(chat_format.stop_token_ids)


# GGUF


@pytest.mark.parametrize(
    ("gguf_type", "tolerance"), [("BF16", 1e-6), pytest.param("Q4_1", 0.7, marks=pytest.mark.slow)]
)
def test_gguf_loads_and_gives_the_logits_of_the_merged_model(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    tiny_base: BaseCheckpoint,
    tmp_path: Path,
    gguf_type: GgufType,
    tolerance: float,
) -> None:
    run(registry, manifest, tiny_base, ExportPaths(tmp_path / "merged", tmp_path / "tiny.gguf", gguf_type))
    merged = logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    deviation = (logits(loaded) - merged).abs().mean() / merged.abs().mean()  # about 1.4 for unrelated models
    assert deviation < tolerance


def test_gguf_of_untied_embeddings_has_an_output_matrix(
    tmp_path: Path, tiny_adapter: Path, tiny_base: BaseCheckpoint
) -> None:
    header = _gguf(tiny_base, tiny_adapter, tmp_path).read_bytes()
    names = {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"}
    assert not [name for name in names if name.encode() not in header]


@pytest.mark.parametrize("fixture", ["llama2", "llama3"])
def test_gguf_vocabulary_tokenizes_as_the_original(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path, fixture: str
) -> None:
    """The two kinds: SentencePiece's with scores, and byte-level BPE."""
    original = PROJECT / "tests" / "fixtures" / f"{fixture}_reduced_tokenizer.json"
    size = max(Tokenizer.from_file(str(original)).get_vocab().values()) + 3
    base = Path(shutil.copytree(tiny_base.path, tmp_path / "base"))
    shutil.copyfile(original, base / "tokenizer.json")
    names = {"llama2": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>")}[fixture]
    (base / "tokenizer_config.json").write_text(json.dumps({"bos_token": names[0], "eos_token": names[1]}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    vocabulary = read_vocabulary(BaseCheckpoint("base", str(base), base, None))

    tokenizer = Tokenizer.from_file(str(original))
    assert len(vocabulary.tokens) == len(vocabulary.types) == size
    assert all(vocabulary.tokens[token_id] == token for token, token_id in tokenizer.get_vocab().items())
    assert vocabulary.special["bos"] == tokenizer.token_to_id(names[0])
    if fixture == "llama3":
        assert (vocabulary.model, vocabulary.pre, vocabulary.add_bos) == ("gpt2", "llama-bpe", True)
        assert vocabulary.merges == ["Ċ Ċ"]
        return
    assert (vocabulary.model, vocabulary.add_space_prefix) == ("llama", True)
    assert vocabulary.merges == []
    # SentencePiece's rule: merge the neighbours whose result has the highest score, leftmost first.
    scores = {token: vocabulary.scores[token_id] for token, token_id in tokenizer.get_vocab().items()}
    texts = ["The gate key hangs by the porch.", "[INST] hi [/INST]", "Where does the gate key hang?"]
    for text in texts:
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            joined = map("".join, itertools.pairwise(pieces))
            pairs = [(scores[piece], -i) for i, piece in enumerate(joined) if piece in scores]
            if not pairs:
                break
            at = -max(pairs)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        assert pieces == tokenizer.encode(text).tokens


def test_llama_3_1_frequencies_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / torch.from_numpy(llama_3_rope_factors(rope, 128)), expected, rtol=1e-5)


def test_gguf_says_what_it_cannot_say(tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(tiny_base.path, tmp_path / "tiny-llama"))
    tokenizer_json = json.loads((odd / "tokenizer.json").read_text())
    tokenizer_json["pre_tokenizer"] = {"type": "Whitespace"}
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    with pytest.raises(ExportError, match=r"no name in GGUF \(Whitespace\)"):
        _gguf(resolve_base_model(str(odd)), tiny_adapter, tmp_path)
    config = json.loads((tiny_base.path / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_type": "yarn", "factor": 2.0}
    shutil.copyfile(tiny_base.path / "tokenizer.json", odd / "tokenizer.json")
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="'yarn'"):
        _gguf(resolve_base_model(str(odd)), tiny_adapter, tmp_path)


def _gguf(base: BaseCheckpoint, adapter: Path, folder: Path) -> Path:
    lora = LoraParams(r=4, lora_alpha=8, target_modules=sorted(LLAMA_LINEARS))
    weights = MergedWeights(base, adapter, lora, FLOAT32, "nf4")
    write_gguf(weights, folder / "x.gguf", "F16", name="x", description="x", chat_template="x", eot_token_id=2)
    return folder / "x.gguf"


# Losses


def test_losses_are_measured_on_the_recorded_samples_and_written_down(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    rows = evaluation_rows(manifest, tiny_base, None)
    assert "1 recorded samples" in rows.description
    targets = ExportPaths(tmp_path / "merged", tmp_path / "tiny.gguf", "Q8_0")
    record = run(registry, manifest, tiny_base, targets, rows=rows)
    assert record.served_loss is not None
    assert record.merged_loss == pytest.approx(record.served_loss, rel=0.05)
    assert record.gguf_loss == pytest.approx(record.merged_loss, rel=0.05)
    assert record.merged_loss != record.served_loss
    saved_record = json.loads((tmp_path / "merged" / "corral_export.json").read_text())
    assert saved_record == {**dataclasses.asdict(record)}
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert f"{record.served_loss:.4f}" in readme
    assert "NF4" in readme


def test_rows_may_come_from_a_text_or_a_dataset(
    manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    text, dataset = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("The gate key hangs by the porch. " * 200)
    dataset.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    rows = evaluation_rows(manifest, tiny_base, text).rows
    assert len(rows) > 1
    assert rows[0]["labels"] == rows[0]["input_ids"]
    (row,) = evaluation_rows(manifest, tiny_base, dataset).rows
    assert row["labels"][0] == -100
    text.write_text("")
    with pytest.raises(CorralError, match="has 0 tokens"):
        evaluation_rows(manifest, tiny_base, text)
    bare = manifest.model_copy(update={"samples": []})
    assert evaluation_rows(bare, tiny_base, None) == EvaluationRows(
        [], evaluation_rows(bare, tiny_base, None).description
    )


def test_held_out_rows_are_taken_only_where_they_are_those_of_the_run(
    manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    dataset = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Question {n}", "completion": f"Answer {n} " + "again " * n} for n in range(12)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig.model_validate(
        {
            "base_model": tiny_base.source,
            "adapter": "ranch",
            "data": {"path": str(dataset), "held_out": 0.25},
            "max_length": 128,
        }
    )
    inputs = read_inputs(config)
    fields = {
        "config": config.model_dump(mode="json"),
        "dataset": inputs.dataset,
        "metrics": {**manifest.metrics, "eval_tokens": float(num_labelled(inputs.held_out_rows))},
    }
    of_run = manifest.model_copy(update=fields)
    evaluation = evaluation_rows(of_run, tiny_base, None)
    assert list(evaluation.rows) == list(inputs.held_out_rows)
    assert "held-out rows" in evaluation.description
    other_split = of_run.model_copy(update={"metrics": {**of_run.metrics, "eval_tokens": 1.0}})
    assert "recorded samples" in evaluation_rows(other_split, tiny_base, None).description
    dataset.write_text(dataset.read_text() + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert "recorded samples" in evaluation_rows(of_run, tiny_base, None).description


# Complete or not at all


def test_targets_in_use_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for targets, word in (
        (ExportPaths(tmp_path / "full", None), "is not empty"),
        (ExportPaths(tmp_path / "full" / "mine", None), "is a file"),
        (ExportPaths(None, tmp_path / "full" / "mine"), "already exists"),
        (ExportPaths(None, None), "nothing to export"),
    ):
        with pytest.raises(ExportError, match=word):
            targets.check()
    assert (tmp_path / "full" / "mine").read_text() == "x"


SMALL_DISK = """
import resource, sys
from pathlib import Path
import torch
from training.base_models.resolve import resolve_base_model
from training.export.export import ExportPaths, export
from training.export.losses import EvaluationRows
from training.registry.registry import AdapterRegistry
registry = AdapterRegistry(sys.argv[1])
manifest = registry.resolve("ranch")
base = resolve_base_model(sys.argv[2])
base.weights_sha256()
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
target = Path(sys.argv[3])
for targets in (ExportPaths(target / "merged", None), ExportPaths(None, target / "a.gguf")):
    try:
        export(manifest, registry.fetch(manifest), base, targets, onto="nf4", rows=EvaluationRows([], ""),
               device=torch.device("cpu"))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.promise("D12")
def test_disk_that_fills_up_leaves_nothing(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path / "registry"), str(tiny_base.path), str(target)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ExportError", "ExportError"], result.stdout + result.stderr
    assert "its partial files were removed" in lines[0]
    assert list(target.iterdir()) == []


def test_export_into_an_empty_folder_that_is_there(
    registry: AdapterRegistry, manifest: AdapterManifest, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    run(registry, manifest, tiny_base, ExportPaths(tmp_path / "merged", None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "registry"]
    assert load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
