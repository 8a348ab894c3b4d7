"""A training step computes what a plain PyTorch loop does, also packed, divided and on two workers."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.config.data_config import DataConfig
from training.config.train_config import TrainConfig
from training.data.row_store import IGNORED_LABEL, TokenizedRow
from training.data.run_inputs import read_inputs
from training.trainer.qlora import attach_lora
from training.trainer.sft_trainer import collate, neftune, training_forward
from training.trainer.train import step_batches, train

ROWS: list[TokenizedRow] = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED_LABEL, IGNORED_LABEL, 7, 8, 9]},
    {"input_ids": [100, 200], "labels": [IGNORED_LABEL, 200]},
    {"input_ids": [11, 12, 13, 14, 15, 16, 17, 18], "labels": [IGNORED_LABEL] * 4 + [15, 16, 17, 18]},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def config(tiny_base: BaseCheckpoint, tmp_path: Path) -> TrainConfig:
    """No dropout, float32: two computations of the same value may differ by rounding only."""
    dataset = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"Ask {n}" + " again" * (n % 9), "completion": f"Answer {n}" + " so" * (n % 5)} for n in range(24)
    ]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(tiny_base.path),
            "adapter": "tiny",
            "data": {"path": str(dataset), "held_out": 0},
            "quantization": {"compute_dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "per_device_train_batch_size": 4,
            "max_steps": 5,
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "chat": {"default_system": "none"},
            "max_length": 96,
            "sample_prompts": 0,
        }
    )


class Losses:
    """A RunReporter that keeps each step's loss."""

    rank = 0

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_phase(self, phase: str) -> None: ...

    def on_log(self, step: int, num_steps: int, metrics: Any) -> None:
        self.losses.append(metrics["loss"])

    def on_checkpoint(self, directory: Path, step: int, metrics: Any) -> None: ...


def trained(config: TrainConfig, folder: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each step's loss, and the adapter."""
    run = Losses()
    config = TrainConfig.model_validate(config.model_dump() | changes)
    train(config, run, adapter_dir=folder / "a", scratch_dir=folder / "s", device=torch.device("cpu"))
    return run.losses, load_file(folder / "a" / "adapter_model.safetensors")


def assert_same(one: tuple[list[float], dict[str, Any]], other: tuple[list[float], dict[str, Any]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-4)
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=0, atol=1e-4)


def test_losses_and_adapter_are_those_of_a_plain_pytorch_loop(config: TrainConfig, tmp_path: Path) -> None:
    losses, adapter = trained(config, tmp_path)

    inputs = read_inputs(config)
    torch.manual_seed(config.seed)  # A's first values
    model = attach_lora(load_quantized(inputs.base, config.quantization), config.lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches, _ = step_batches(config, inputs, 0, 1)
    expected = []
    for step, batch in enumerate(list(batches)[:5]):
        rows = [inputs.train_rows[row] for row in batch]
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] + [IGNORED_LABEL] * (width - len(row["labels"])) for row in rows])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    names = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert_same((losses, adapter), (expected, {name: names[name].detach() for name in adapter}))


def test_packed_loss_and_gradients_are_those_of_rows_alone(tiny_base: BaseCheckpoint, config: TrainConfig) -> None:
    model = attach_lora(load_quantized(tiny_base, config.quantization), config.lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of A
            torch.nn.init.normal_(parameter, std=0.1)

    def loss_and_gradients(batches: list[list[TokenizedRow]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        with training_forward(model):
            losses = [model(**collate(rows)) for rows in batches]
        total = torch.stack(losses).sum()
        total.backward()
        return total.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, alone = loss_and_gradients([ROWS]), loss_and_gradients([[row] for row in ROWS])
    assert packed[0] == pytest.approx(alone[0], abs=1e-4)
    assert len(packed[1]) == 2 * 2 * 7
    for ours, theirs in zip(packed[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_packed_run_learns_what_the_same_rows_teach_unpacked(config: TrainConfig, tmp_path: Path) -> None:
    """One pack of all rows a step is all rows a step."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_rows": 12})})
    every_row = {"max_length": 512, "per_device_train_batch_size": 1, "packing": True, "max_steps": 3}
    unpacked = {"max_length": 512, "per_device_train_batch_size": 12, "max_steps": 3}
    assert_same(trained(config, tmp_path / "1", **every_row), trained(config, tmp_path / "2", **unpacked))


def test_two_accumulated_micro_batches_of_two_are_one_of_four(config: TrainConfig, tmp_path: Path) -> None:
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same(trained(config, tmp_path / "1", **halves), trained(config, tmp_path / "2"))


def test_a_last_step_with_fewer_rows_weighs_its_tokens_alike(config: TrainConfig, tmp_path: Path) -> None:
    """24 rows in steps of 10: the third step of an epoch has 4."""
    undivided = {"per_device_train_batch_size": 10, "max_steps": 4}
    divided = {"per_device_train_batch_size": 3, "train_batch_size": 10, "max_steps": 4}
    assert_same(trained(config, tmp_path / "1", **divided), trained(config, tmp_path / "2", **undivided))


def test_gradient_checkpointing_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"lora_dropout": 0.2})})
    assert_same(trained(config, tmp_path / "1", gradient_checkpointing=True), trained(config, tmp_path / "2"))


def test_many_labelled_tokens_are_taken_in_chunks(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = trained(config, tmp_path / "1")
    monkeypatch.setattr("training.trainer.sft_trainer._LOGITS_CHUNK", 7)
    assert_same(trained(config, tmp_path / "2"), reference)


_WORKER = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.trainer.test_sft_trainer import Losses
from training.config.train_config import TrainConfig
from training.trainer.train import train

torch.set_num_threads(1)
dist.init_process_group("gloo")
for rows_a_step in (4, 7):
    folder = Path(sys.argv[1], str(rows_a_step), os.environ["RANK"])
    run = Losses()
    run.rank = dist.get_rank()
    config = TrainConfig.model_validate_json(Path(sys.argv[1], "config.json").read_text())
    config = config.model_copy(update={"train_batch_size": rows_a_step})
    train(config, run, adapter_dir=folder / "a", scratch_dir=folder / "s", device=torch.device("cpu"))
    (folder / "losses.json").write_text(json.dumps(run.losses))
"""


def test_two_gloo_workers_are_one_worker_with_the_same_rows_a_step(config: TrainConfig, tmp_path: Path) -> None:
    """Steps of 7: the last of an epoch has 3 rows, and one worker sees more tokens than the other."""
    config = config.model_copy(update={"per_device_train_batch_size": 2})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path)], env=common | {"RANK": r, "LOCAL_RANK": r})
        for r in ("0", "1")
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for rows_a_step in (4, 7):
        one = trained(config, tmp_path / f"one-{rows_a_step}", train_batch_size=rows_a_step)
        for rank in ("0", "1"):
            folder = tmp_path / str(rows_a_step) / rank
            losses = json.loads((folder / "losses.json").read_text())
            assert_same((losses, load_file(folder / "a" / "adapter_model.safetensors")), one)


def test_neftune_noise_has_the_papers_scale_for_every_document(tiny_base: BaseCheckpoint, config: TrainConfig) -> None:
    model = attach_lora(load_quantized(tiny_base, Quantization()), config.lora).train()
    embed_tokens = model.get_base_model().model.embed_tokens
    outputs: list[torch.Tensor] = []
    batch = collate(ROWS)
    with training_forward(model), neftune(model, 5.0):
        handle = embed_tokens.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
        for _ in range(200):
            model(**batch)
        handle.remove()
    plain = embed_tokens(batch["input_ids"])
    assert len(outputs) == 200
    largest = (torch.stack(outputs) - plain).abs().amax((0, 1, 3))  # [num_tokens]
    starts = [0, 5, 7, 15]
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        bound = 5.0 / math.sqrt(len(ROWS[row]["input_ids"]) * plain.shape[-1])
        assert largest[start:end].max() <= bound * 1.01  # the base computes in bfloat16 where it can
        assert largest[start:end].max() > bound * 0.9
    model.eval()
    with training_forward(model), neftune(model, 5.0), torch.no_grad():
        assert torch.equal(embed_tokens(batch["input_ids"]), plain)


def test_loraplus_gives_b_its_own_learning_rate(config: TrainConfig, tmp_path: Path) -> None:
    """With Adam, the first step is the learning rate long in every coordinate that has a gradient."""
    changes: dict[str, Any] = {"max_steps": 1, "weight_decay": 0.0}
    _, plain = trained(config, tmp_path / "1", **changes)
    _, faster = trained(config, tmp_path / "2", **changes, loraplus_lr_ratio=4.0)
    for name in plain:
        if "lora_B" in name:
            torch.testing.assert_close(faster[name], 4 * plain[name], rtol=1e-2, atol=1e-5)
        else:
            torch.testing.assert_close(faster[name], plain[name])


def test_dataset_is_not_needed_in_memory(config: TrainConfig) -> None:
    assert isinstance(config.data, DataConfig)
    rows = read_inputs(config).train_rows
    assert len(rows.lengths) == len(rows) == 24
