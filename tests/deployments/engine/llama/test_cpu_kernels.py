"""The compiled forward: the same weights as in training in 4.13 bits, and sums that do not depend on the batch."""

import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from deployments.engine.bench import random_adapter
from deployments.engine.llama import cpu_kernels
from deployments.engine.llama.cpu_kernels import KernelsUnavailable
from deployments.engine.llama.cpu_llama import CpuLlama
from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import LoraWeights
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaLinear, module_path
from training.base_models.nf4 import ComputeDtype, Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint

TOKENS = list(range(3000, 3100))
NO_ADAPTER, TABLE = -1, list(range(3, 11))


def cpu_llama(base: BaseCheckpoint, quantization: Quantization) -> CpuLlama:
    model = load_quantized(base, quantization)
    return CpuLlama(model, max_model_len=128, max_num_seqs=10, kv_cache_bytes=1 << 30, max_loras=2)


def linear(model: torch.nn.Module, layer: int, target: LlamaLinear) -> torch.nn.Module:
    return model.get_submodule(f"model.layers.{layer}.{module_path(target)}")


@pytest.mark.parametrize("double_quant", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_bit_equal_to_those_that_training_multiplies_by(
    embedded_base: BaseCheckpoint, dtype: ComputeDtype, double_quant: bool
) -> None:
    quantization = Quantization(compute_dtype=dtype, double_quant=double_quant)
    trained = load_quantized(embedded_base, quantization)
    served = cpu_llama(embedded_base, quantization)
    for layer in (0, 13, 29):
        for target in LLAMA_LINEARS:
            weight = linear(trained, layer, target).weight
            expected = bnb.dequantize_4bit(weight.data, weight.quant_state)
            assert expected.dtype == getattr(torch, dtype)
            assert torch.equal(served.dequantized(layer, target), expected.float())


def test_linears_take_4_13_bits_a_parameter(embedded_base: BaseCheckpoint) -> None:
    served = cpu_llama(embedded_base, Quantization())
    num_parameters = sum(w.n * w.k for layer in served._layers for w in layer.linears)
    assert num_parameters == 106_168_320
    assert served.linear_bytes() * 8 / num_parameters < 4.13


@pytest.mark.promise("A7")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_logits_are_bit_equal_alone_in_a_batch_and_in_chunks(
    embedded_base: BaseCheckpoint, dtype: ComputeDtype
) -> None:
    llama = cpu_llama(embedded_base, Quantization(compute_dtype=dtype))
    config = load_quantized(embedded_base, Quantization()).config
    for slot, r in enumerate((8, 16)):
        weights = LoraWeights.from_peft(random_adapter(config, r, slot), 2.0, llama.dtype, llama.device)
        llama.set_adapter(slot, weights)

    def logits(*chunks: tuple[list[int], int, int, list[int]]) -> torch.Tensor:  # (tokens, start, slot, blocks)
        batch = ForwardBatch(
            token_ids=[token for tokens, _, _, _ in chunks for token in tokens],
            positions=[start + i for tokens, start, _, _ in chunks for i in range(len(tokens))],
            adapter_slots=[slot for tokens, _, slot, _ in chunks for _ in tokens],
            seq_index=[row for row, (tokens, _, _, _) in enumerate(chunks) for _ in tokens],
            block_tables=[blocks for _, _, _, blocks in chunks],
            output_rows=list(range(sum(len(tokens) for tokens, _, _, _ in chunks))),
        )
        return llama.logits(llama.forward(batch))

    for slot in (NO_ADAPTER, 1):
        expected = logits((TOKENS, 0, slot, TABLE))
        parts = [
            logits((TOKENS[start:end], start, slot, TABLE)) for start, end in [(0, 1), (1, 14), (14, 40), (40, 100)]
        ]
        assert torch.equal(torch.cat(parts), expected)
        neighbours: list[tuple[list[int], int, int, list[int]]] = [
            (list(range(50, 50 + n)), 0, slot, [11 + 8 * i + j for j in range(8)])
            for i, (n, slot) in enumerate([(1, 0), (30, NO_ADAPTER), (7, 1)])
        ]
        assert torch.equal(logits(*neighbours, (TOKENS, 0, slot, TABLE))[38:], expected)
    assert not torch.equal(logits((TOKENS, 0, 0, TABLE)), expected)  # the adapter matters


def test_one_thread_gives_the_bits_of_two(tiny_base: BaseCheckpoint) -> None:
    results = []
    for num_threads in (1, 2):
        llama = cpu_llama(tiny_base, Quantization())
        llama._model.num_threads = num_threads
        batch = ForwardBatch(TOKENS, list(range(100)), [NO_ADAPTER] * 100, [0] * 100, [TABLE], list(range(100)))
        results.append(llama.logits(llama.forward(batch)))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("false", "false failed: no message"),
    ],
)
def test_without_a_compiler_it_says_why(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    cpu_kernels.load_kernels.cache_clear()
    with pytest.raises(KernelsUnavailable, match=reason):
        cpu_kernels.load_kernels()
    monkeypatch.undo()
    cpu_kernels.load_kernels()


def test_four_processes_compile_once(tmp_path: Path) -> None:
    program = "from deployments.engine.llama.cpu_kernels import load_kernels; load_kernels().has_bf16_dot()"
    environment = {"CORRAL_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(4)]
    assert [process.wait(timeout=300) for process in started] == [0] * 4
    assert len([path.name for path in (tmp_path / "kernels").glob("*.so")]) == 1
