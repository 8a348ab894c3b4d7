"""The memory estimate against counted bytes: what autograd keeps, and the peak of all live tensors, of real steps."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from training.base_models.llama_shape import LlamaDims
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import LoraSettings
from training.planning.memory import EVAL_BATCH_TOKENS, LOGITS_CHUNK, SCORES_UP_TO, TrainStep, estimate, largest_batch
from training.trainer import evaluate, sft_trainer, varlen_attention
from training.trainer.qlora import attach_lora
from training.trainer.sft_trainer import collate, training_forward

LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
}  # fmt: skip
LLAMA_33B = LLAMA_7B | {
    "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
}  # fmt: skip
LLAMA_65B = LLAMA_7B | {
    "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
LLAMA2_70B = LLAMA_65B | {"intermediate_size": 28672, "num_key_value_heads": 8}
LLAMA_31_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}

STEP = TrainStep(
    lora=LoraSettings(r=8, lora_dropout=0.0),
    quantization=Quantization(),
    optim="adamw_torch",
    gradient_checkpointing=False,
    max_length=128,
)


class SavedBytes:
    """Bytes of the different storages that autograd keeps for the backward pass, apart from `but`."""

    def __init__(self, but: set[int]) -> None:
        self._but, self.storages = but, dict[int, torch.UntypedStorage]()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._but:
            self.storages[storage.data_ptr()] = storage  # kept alive, so that no address is reused
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once; what an operator holds inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        before = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self._before = before  # kept alive, so that no address is reused
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, address: int) -> None:
        self.live -= self._known.pop(address)


@dataclass
class Counted:
    saved: int  # bytes kept for the backward pass
    peak: int  # beyond the memory in use before a step: activations, gradients, workspace
    weights: int
    estimated: Any


def count(
    folder: Path, step: TrainStep, *, batch_size: int = 2, device: str = "cpu", labelled: int = 8, **shape: int
) -> Counted:
    """Train two steps as `training.trainer.train` does, the second one counted."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 4, "vocab_size": 512, **shape})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    quantization = step.quantization.model_copy(update={"compute_dtype": step.compute_dtype})
    base = load_quantized(BaseCheckpoint("x", "x", folder, None), quantization, device)
    model = attach_lora(base, step.lora).train()
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(0, config.vocab_size, (batch_size, step.max_length)).tolist()
    labels = [[-100] * (step.max_length - labelled) + row[-labelled:] for row in ids]
    rows = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels, strict=True)]
    batch = {name: t if name == "cu_seq_lens" else t.to(device) for name, t in collate(rows).items()}  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}

    def forward() -> torch.Tensor:
        mixed = step.compute_dtype != "float32"
        with torch.autocast(device, getattr(torch, step.compute_dtype) if mixed else None, enabled=mixed):
            loss: torch.Tensor = model(**batch)
        return loss

    def whole_step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    with training_forward(model):
        whole_step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            whole_step()
            saved, peak = 0, torch.cuda.max_memory_allocated()
        else:
            saved_bytes = SavedBytes(resident)
            with torch.autograd.graph.saved_tensors_hooks(saved_bytes.pack, lambda tensor: tensor):
                loss = forward()
            saved = saved_bytes.total
            del loss, saved_bytes
            with PeakBytes() as counter:
                whole_step()
            peak = counter.peak
    share = labelled / step.max_length
    return Counted(
        saved=saved,
        peak=peak,
        weights=_base_bytes(model),
        estimated=estimate(config.to_dict(), replace(step, labelled_share=share), batch_size),
    )


def _base_bytes(model: PeftModel) -> int:
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    scales = [t for s in states for t in (s.absmax, s.state2.absmax)]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in [*frozen, *scales])


@pytest.fixture
def gpu_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators of the CUDA path on this CPU: PEFT sees autocast, attention holds no scores."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    monkeypatch.setattr(varlen_attention, "_SCORES_UP_TO", 0)
    yield
    torch.set_autocast_enabled("cpu", False)  # torch.autocast read the previous state and restored it


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 256, "num_key_value_heads": 8, "num_hidden_layers": 3}])
def test_activations_of_the_gpu_path_are_those_that_autograd_keeps(
    tmp_path: Path, gpu_operators: None, shape: dict[str, int], targets: Any
) -> None:
    step = replace(STEP, lora=LoraSettings(r=8, lora_dropout=0.0, target_modules=targets))
    counted = count(tmp_path, step, **shape)
    assert counted.estimated.activations == pytest.approx(counted.saved, rel=0.15)
    step_bytes = counted.estimated.gradients + counted.estimated.activations + counted.estimated.workspace - (32 << 20)
    assert step_bytes == pytest.approx(counted.peak, rel=0.15)


def test_peak_of_the_gpu_path_with_gradient_checkpointing(tmp_path: Path, gpu_operators: None) -> None:
    counted = count(tmp_path, replace(STEP, gradient_checkpointing=True), num_hidden_layers=8)
    step_bytes = counted.estimated.gradients + counted.estimated.activations + counted.estimated.workspace - (32 << 20)
    assert step_bytes == pytest.approx(counted.peak, rel=0.15)


def test_peak_of_the_gpu_path_where_logits_are_most_of_it(tmp_path: Path, gpu_operators: None) -> None:
    counted = count(tmp_path, STEP, vocab_size=32000, labelled=100)
    step_bytes = counted.estimated.gradients + counted.estimated.activations + counted.estimated.workspace - (32 << 20)
    assert counted.estimated.phase == "loss"
    assert step_bytes == pytest.approx(counted.peak, rel=0.15)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_on_a_cpu_are_those_that_autograd_keeps(tmp_path: Path, compute_dtype: Any, dropout: float) -> None:
    lora = LoraSettings(r=8, lora_dropout=dropout)
    counted = count(tmp_path, replace(STEP, lora=lora, compute_dtype=compute_dtype, on_gpu=False))
    assert counted.estimated.activations == pytest.approx(counted.saved, rel=0.15)


def test_weights_are_those_of_the_loaded_base(tmp_path: Path) -> None:
    counted = count(tmp_path, replace(STEP, on_gpu=False), batch_size=1, vocab_size=1024, hidden_size=256)
    assert counted.estimated.base_4bit + counted.estimated.base_other == pytest.approx(counted.weights, rel=0.01)


def test_number_of_parameters_and_of_trained_ones(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    dims = LlamaDims.of(config.to_dict())
    assert dims.num_parameters == sum(p.numel() for p in model.parameters())
    lora = LoraSettings(r=3, target_modules=["v_proj", "down_proj"])
    assert dims.num_trainable(lora.r, lora.targets) == 2 * 3 * ((64 + 32) + (128 + 64))


def test_chunk_sizes_are_those_of_the_training_code() -> None:
    assert sft_trainer._LOGITS_CHUNK == LOGITS_CHUNK
    assert varlen_attention._SCORES_UP_TO == SCORES_UP_TO
    assert evaluate._BATCH_TOKENS == EVAL_BATCH_TOKENS


@pytest.mark.parametrize(("config", "gigabytes"), [(LLAMA_7B, 5), (LLAMA_13B, 10), (LLAMA_33B, 21), (LLAMA_65B, 41)])
def test_weights_and_adapter_are_a_little_below_what_the_qlora_paper_says_a_model_takes(
    config: dict[str, int], gigabytes: int
) -> None:
    """arXiv:2305.14314, table 6: memory of the 4-bit Guanaco models with their adapters, r 64 on all linear layers."""
    estimated = estimate(config, replace(STEP, lora=LoraSettings(r=64)), 1)
    model_bytes = estimated.base_4bit + estimated.base_other + estimated.adapter
    assert 0.75 < model_bytes / (gigabytes * 1e9) < 1


def test_held_out_rows_of_a_large_vocabulary_are_the_peak_of_a_lean_step() -> None:
    lean = replace(STEP, gradient_checkpointing=True, optim="paged_adamw_8bit")
    assert estimate(LLAMA_31_8B, lean, 1).phase != "evaluation"
    evaluated = estimate(LLAMA_31_8B, replace(lean, evaluates=True), 1)
    assert evaluated.phase == "evaluation"
    assert evaluated.workspace > 2048 * 128256 * (2 + 4 + 4)


def test_checkpointing_and_8_bit_moments_make_a_70b_step_fit_where_it_would_not() -> None:
    plain = replace(STEP, max_length=512, lora=LoraSettings(r=64))
    lean = replace(plain, gradient_checkpointing=True, optim="paged_adamw_8bit")
    assert largest_batch(LLAMA2_70B, plain, 80 << 30) < largest_batch(LLAMA2_70B, lean, 80 << 30)
    estimated = estimate(LLAMA2_70B, lean, 1)
    assert estimated.optimizer < 0.05 * estimated.paged  # those of k and v
    assert largest_batch(LLAMA2_70B, lean, 40 << 30) == 0
    fitting = largest_batch(LLAMA_7B, lean, 24 << 30)
    assert estimate(LLAMA_7B, lean, fitting).total_bytes <= 24 << 30 < estimate(LLAMA_7B, lean, 2 * fitting).total_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_estimate_is_what_cuda_allocates(tmp_path: Path, checkpointing: bool, dropout: float) -> None:
    lora = LoraSettings(r=16, lora_dropout=dropout)
    step = replace(STEP, lora=lora, gradient_checkpointing=checkpointing, max_length=512)
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 16, "vocab_size": 32000}
    counted = count(tmp_path, step, batch_size=4, device="cuda", labelled=256, **sizes)
    assert counted.estimated.allocated_bytes == pytest.approx(counted.peak, rel=0.15)
