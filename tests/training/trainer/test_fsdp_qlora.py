"""FSDP-QLoRA on two real workers: the same bits as a complete base on each, in half the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import free_port
from training.base_models.llama_shape import LlamaDims
from training.base_models.resolve import BaseCheckpoint
from training.config.load import build_config
from training.config.train_config import TrainConfig
from training.errors import ConfigError, TrainingError
from training.planning.resources import check_resources

PROJECT = Path(__file__).parents[3]
NUM_LAYERS = 5
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_checkpointing": False},
    "checkpointing": {
        "gradient_checkpointing": True,
        "quantization": {"compute_dtype": "float32", "double_quant": False},
    },
}

# Every worker runs this. Bytes are counted whenever a layer begins to arrive.
_WORKER = """
import gc, json, shutil, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.trainer.test_train import Recorder
from training.trainer import fsdp_qlora
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import resolve_base_model
from training.config.train_config import TrainConfig
from training.trainer.train import train

torch.set_num_threads(1)
device = torch.device(sys.argv[2])
dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
rank = dist.get_rank()
if device.type == "cuda":
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
folder = Path(sys.argv[1])
parts = []
peak = live = 0


class Counted(fsdp_qlora._LayerShard):
    def __init__(self, layer):
        super().__init__(layer)
        parts.append(self)

    def start_gather(self):
        global peak
        super().start_gather()
        peak = max(peak, sum(t.untyped_storage().nbytes() for part in parts for t in (part._shard, part._full)))


class Keeper(Recorder):
    def on_log(self, step, num_steps, metrics):
        global live  # whoever holds them: codes and scales of the whole process
        super().on_log(step, num_steps, metrics)
        codes = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.dtype == torch.uint8]
        live = max(live, sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in codes}.values()))

    def on_checkpoint(self, directory, step, metrics):
        if rank == 0:
            super().on_checkpoint(directory, step, metrics)
            if step == 2:
                shutil.copytree(directory, kept)
        dist.barrier()


fsdp_qlora._LayerShard = Counted
found = {}


def run(name, settings, fsdp, resume_from=None):
    global peak, live, kept
    config = TrainConfig.model_validate(settings | {"fsdp": fsdp})
    recorder, own, kept = Keeper(rank=rank), folder / f"{name}-{fsdp}-{rank}", folder / f"{name}-{fsdp}"
    parts.clear()
    gc.collect()
    peak = live = 0
    result = train(
        config, recorder, adapter_dir=own, scratch_dir=own / "scratch", device=device, resume_from=resume_from
    )
    found[f"{name} {fsdp}"] = {
        "steps": {step: {key: m[key] for key in ("loss", "grad_norm")} for step, m in recorder.steps.items()},
        "eval": [m["eval_loss"] for m in recorder.steps.values() if "eval_loss" in m],
        "metrics": {k: v for k, v in result.metrics.items() if k != "train_s"},
        "samples": [[s.base, s.adapter] for s in result.samples],
        "sha256": result.adapter_sha256,
        "checkpoints": recorder.checkpoints,
        "peak": peak,
        "live": live,
    }

base = resolve_base_model(json.loads((folder / "base.json").read_text()))
for dtype, double_quant in (("float32", True), ("bfloat16", False)):
    quantization = Quantization(compute_dtype=dtype, double_quant=double_quant)
    whole = load_quantized(base, quantization, device)
    sharded = fsdp_qlora.load_sharded(base, quantization, device)
    bits_of = fsdp_qlora._four_bit_tensors
    pairs = list(zip(sharded.model.layers, whole.model.layers, strict=True))
    equal = []
    for ours, theirs in pairs:  # compared in the middle of the layer's forward pass
        ours.mlp.register_forward_hook(lambda *_, ours=ours, theirs=theirs: equal.extend(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(bits_of(ours), bits_of(theirs), strict=True)))
    sharded(torch.arange(4, device=device)[None])
    assert len(equal) == len(pairs) * 7 * (3 if double_quant else 2)
    others = [n for n, p in whole.named_parameters() if p.dtype != torch.uint8]
    assert len(others) == 3 + 2 * len(pairs)
    equal += [torch.equal(whole.get_parameter(n), sharded.get_parameter(n)) for n in others]
    found[f"weights {dtype} {double_quant}"] = all(equal)
    del whole, sharded, ours, theirs, pairs

runs = json.loads((folder / "runs.json").read_text())
for name, settings in runs.items():
    for fsdp in (False, True):
        run(name, settings, fsdp)
run("resumed", runs["plain"], True, resume_from=folder / "plain-True")
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def two_workers(folder: Path, device: str) -> list[dict[str, Any]]:
    """The results of the two workers, by rank."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common["OMP_NUM_THREADS"] = "1"  # bitsandbytes' own threads, too, would only wait for each other
    command = [sys.executable, "-W", "ignore", "-c", _WORKER, str(folder), device]
    workers = [subprocess.Popen(command, cwd=PROJECT, env=common | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    try:
        assert [worker.wait(timeout=400) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def prepare(folder: Path, tiny_base: BaseCheckpoint) -> None:
    """A base of more layers in float16, as Llama 2 has it, and the runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_base.path, num_hidden_layers=NUM_LAYERS)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "base" / name).write_bytes((tiny_base.path / name).read_bytes())
    rows = [{"prompt": f"Ask {n}" + " again" * (n % 9), "completion": f"Say {n}" + " so" * (n % 5)} for n in range(31)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "base_model": str(folder / "base"), "adapter": "tiny", "num_workers": 2, "train_batch_size": 7,
        "data": {"path": str(folder / "rows.jsonl"), "held_out": 0.2}, "per_device_train_batch_size": 2,
        "quantization": {"compute_dtype": "float32"}, "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "max_steps": 4, "learning_rate": 5e-3, "max_length": 96, "sample_prompts": 2, "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    runs = {name: settings | run for name, run in RUNS.items()}
    one_row = {"path": str(folder / "rows.jsonl"), "held_out": 0.03}  # rank 1 has none to evaluate
    runs["checkpointing"]["data"] = one_row
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "base.json").write_text(json.dumps(str(folder / "base")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def results(folder: Path, tiny_base: BaseCheckpoint) -> list[dict[str, Any]]:
    prepare(folder, tiny_base)
    return two_workers(folder, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "double_quant"), [("float32", True), ("bfloat16", False)])
def test_gathered_weights_are_those_of_the_whole_base_to_the_bit(
    results: list[dict[str, Any]], dtype: str, double_quant: bool
) -> None:
    assert [worker[f"weights {dtype} {double_quant}"] for worker in results] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_losses_gradients_and_adapters_are_those_of_whole_bases_to_the_bit(
    results: list[dict[str, Any]], folder: Path, run: str
) -> None:
    """Steps of 7 rows: the workers see different numbers of tokens, and at times one of them none."""
    for rank, worker in enumerate(results):
        sharded, reference = worker[f"{run} True"], worker[f"{run} False"]
        assert len(sharded["steps"]) == 4
        assert len(sharded["eval"]) == 2
        for figures in ("steps", "eval", "metrics", "sha256", "checkpoints"):
            assert sharded[figures] == reference[figures], figures
        ours, theirs = (
            load_file(folder / f"{run}-{fsdp}-{rank}" / "adapter_model.safetensors") for fsdp in (True, False)
        )
        assert ours.keys() == theirs.keys()
        assert len(ours) == NUM_LAYERS * 7 * 2
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.promise("D13")
def test_sharded_run_resumed_from_its_checkpoint_goes_on_as_if_uninterrupted(results: list[dict[str, Any]]) -> None:
    for worker in results:
        resumed, uninterrupted = worker["resumed True"], worker["plain True"]
        assert list(resumed["steps"]) == ["3", "4"]
        assert all(resumed["steps"][step] == uninterrupted["steps"][step] for step in resumed["steps"])
        assert resumed["sha256"] == uninterrupted["sha256"]


@pytest.mark.slow
def test_every_rank_takes_part_in_sample_answers(results: list[dict[str, Any]]) -> None:
    assert (
        results[0]["plain True"]["samples"]
        == results[0]["plain False"]["samples"]
        == results[1]["plain True"]["samples"]
    )
    assert len(results[0]["plain True"]["samples"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("run", "scale_bytes"), [("plain", 1 + 4 / 256), ("checkpointing", 4)])
def test_worker_holds_its_half_of_the_base_and_two_whole_layers(
    results: list[dict[str, Any]], folder: Path, run: str, scale_bytes: float
) -> None:
    """While it loads, trains, evaluates and answers; counted in bytes of storages."""
    linears = LlamaDims.of(json.loads((folder / "base" / "config.json").read_text())).linears
    layer = sum(a * b for a, b in linears.values()) * (0.5 + scale_bytes / 64)
    for worker in results:
        sharded = worker[f"{run} True"]
        assert sharded["peak"] == pytest.approx((NUM_LAYERS / 2 + 2) * layer, rel=0.02)
        assert sharded["live"] <= sharded["peak"]
        assert worker[f"{run} False"]["live"] > 0.85 * NUM_LAYERS * layer


def test_what_cannot_be_sharded_is_refused() -> None:
    one = {"adapter": "a", "data": {"path": "rows.jsonl"}, "fsdp": True}
    for settings, message in (
        ({}, "fsdp shards the base over the workers, but num_workers is 1: use 2 or more"),
        ({"num_workers": [1, 4]}, r"num_workers is \[1, 4\]: use 2 or more"),
        ({"num_workers": 2, "method": "dpo"}, "fsdp requires method sft, but method is dpo: remove fsdp"),
        ({"num_workers": 2, "lora": {"init_lora_weights": "loftq"}}, "lora.init_lora_weights 'loftq' needs the"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_config(one | settings, [], "recipe.yaml")


@pytest.mark.promise("B11")
def test_where_workers_are_too_few_to_share_a_base_the_error_says_to_leave_that() -> None:
    """Fewer workers alone would be the next error."""
    config = TrainConfig.model_validate(
        {"adapter": "a", "data": {"path": "rows.jsonl"}, "fsdp": True, "num_workers": 4, "use_gpu": True}
    )
    with pytest.raises(TrainingError, match=r"is 4 .* has 1 GPU\(s\): set num_workers to 1 and fsdp to false"):
        check_resources(config, cpus=8, gpus=1, where="this machine")
    with pytest.raises(TrainingError, match=r"has 3 GPU\(s\): set num_workers to 3 or less"):
        check_resources(config, cpus=8, gpus=3, where="this machine")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_nccl_train_as_whole_bases_do(tmp_path: Path, tiny_base: BaseCheckpoint) -> None:
    prepare(tmp_path, tiny_base)
    for worker in two_workers(tmp_path, "cuda"):
        assert [worker[name] for name in worker if name.startswith("weights")] == [True, True]
        for run in RUNS:
            sharded, reference = worker[f"{run} True"], worker[f"{run} False"]
            for step, figures in sharded["steps"].items():
                assert figures == pytest.approx(reference["steps"][step], abs=1e-6)
