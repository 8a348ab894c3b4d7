"""Evaluation of an adapter from its files: the same figures as in memory, alone and shared by ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conftest import free_port
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.data.row_store import IGNORED_LABEL, Rows, RowStore, StoredRow, StoreWriter, TokenizedRow
from training.errors import AdapterRefused
from training.trainer.evaluate import evaluate_files, held_out_loss

PROJECT = Path(__file__).parents[3]
ROWS: list[TokenizedRow] = [
    {"input_ids": [*range(5, 15 + n)], "labels": [IGNORED_LABEL] * 4 + [*range(9, 15 + n)]} for n in range(7)
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tiny_base: BaseCheckpoint) -> LlamaForCausalLM:
    return load_quantized(tiny_base, Quantization(compute_dtype="float32"))


def test_files_are_evaluated_and_the_base_is_left_as_it_was(base: LlamaForCausalLM, tiny_adapter: Path) -> None:
    plain, num_tokens = held_out_loss(base, ROWS)
    names = [name for name, _ in base.named_modules()]
    report = evaluate_files(tiny_adapter, base, ROWS)
    assert report.base_eval_loss == plain
    assert report.eval_tokens == num_tokens == sum(6 + n for n in range(7))
    assert report.changes
    shasum = subprocess.run(["sha256sum", tiny_adapter / "adapter_model.safetensors"], capture_output=True, text=True)
    assert report.adapter_sha256 == shasum.stdout.split()[0]
    assert report.metrics.keys() == {"eval_loss", "base_eval_loss", "eval_tokens"}

    assert [name for name, _ in base.named_modules()] == names
    assert held_out_loss(base, ROWS)[0] == plain
    loaded = PeftModel.from_pretrained(base, tiny_adapter)
    assert report.eval_loss == pytest.approx(held_out_loss(loaded, ROWS)[0], abs=1e-6)
    assert report.eval_loss != report.base_eval_loss


def test_adapter_whose_b_is_zero_changes_no_output(base: LlamaForCausalLM, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "zero"))
    weights = folder / "adapter_model.safetensors"
    save_file({k: t * 0 if "lora_B" in k else t for k, t in load_file(weights).items()}, weights)
    report = evaluate_files(folder, base, ROWS)
    assert not report.changes
    assert report.eval_loss == report.base_eval_loss


@pytest.mark.promise("C5")
def test_what_peft_would_only_warn_of_is_refused(base: LlamaForCausalLM, tiny_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "short"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    with pytest.raises(AdapterRefused, match=lost.replace(".", r"\.")):
        evaluate_files(folder, base, ROWS)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match=r"has no adapter_model\.safetensors"):
        evaluate_files(folder, base, ROWS)
    held_out_loss(base, ROWS)  # usable as before


def test_rows_are_read_from_disk_when_their_batch_comes(
    base: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreWriter(tmp_path) as writer:
        for number, row in enumerate(ROWS):
            ids = row["input_ids"]
            tokens = {"input_ids": ids, "spans": [4, len(ids)]}
            writer.append(StoredRow(tokens, None, "", None, 0, number, number, len(ids), len(ids) - 4))
    read: list[int] = []
    original = RowStore.row

    def reading(store: RowStore, row: int) -> Any:
        read.append(row)
        return original(store, row)

    monkeypatch.setattr(RowStore, "row", reading)
    monkeypatch.setattr("training.trainer.evaluate._BATCH_TOKENS", 24)  # two rows at most
    before_forward: list[int] = []
    hook = base.model.register_forward_pre_hook(lambda *_: before_forward.append(len(read)))
    rows: Rows[TokenizedRow] = Rows(RowStore(tmp_path), np.arange(len(ROWS)))
    loss = held_out_loss(base, rows)
    hook.remove()
    assert loss == held_out_loss(base, ROWS)
    assert sorted(read) == [*range(len(ROWS))]
    assert before_forward[0] <= 2
    assert before_forward == sorted(set(before_forward))


def test_rows_without_a_labelled_token_are_refused(base: LlamaForCausalLM, tiny_adapter: Path) -> None:
    with pytest.raises(AdapterRefused, match="none of the 1 held-out rows"):
        evaluate_files(tiny_adapter, base, [{"input_ids": [1, 2], "labels": [7, IGNORED_LABEL]}])


WORKER = """
import json, sys
import torch, torch.distributed as dist
from pathlib import Path
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import resolve_base_model
from training.trainer.evaluate import evaluate_files
torch.set_num_threads(1)
rank, port, base, adapter, rows = int(sys.argv[1]), *sys.argv[2:6]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = load_quantized(resolve_base_model(base), Quantization(compute_dtype="float32"))
report = evaluate_files(Path(adapter), model, json.loads(rows))
print(json.dumps([report.eval_loss, report.base_eval_loss, report.eval_tokens]))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_gloo_ranks_share_the_rows_and_get_what_one_gets(
    base: LlamaForCausalLM, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    expected = evaluate_files(tiny_adapter, base, ROWS)
    arguments = [str(free_port()), str(tiny_base.path), str(tiny_adapter), json.dumps(ROWS)]
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments], stdout=subprocess.PIPE, cwd=PROJECT)
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    assert results[0] == results[1]
    assert results[0] == pytest.approx([expected.eval_loss, expected.base_eval_loss, expected.eval_tokens], abs=1e-5)
