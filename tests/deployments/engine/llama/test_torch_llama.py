"""What a CPU can check of the CUDA path, and, marked gpu, the rest: paged attention and CUDA graphs."""

from collections.abc import Callable

import pytest
import torch

from deployments.engine.bench import random_adapter, random_llama
from deployments.engine.engine import Engine
from deployments.engine.llama import paged_attention
from deployments.engine.llama.cuda_graphs import decode_sizes
from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import LoraWeights
from deployments.engine.llama.paged_attention import varlen_attn_reads_blocks
from deployments.engine.llama.step_tensors import pad_batch
from deployments.engine.llama.torch_llama import TorchLlama
from deployments.engine.request import EngineRequest
from tests.deployments.engine.test_engine import Answers, drain, greedy
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint

CPU = torch.device("cpu")
LENGTHS = [3, 17, 40]


def prompts_and_next() -> tuple[ForwardBatch, ForwardBatch]:
    """Three prompts, and then a token more of each, in blocks of 16."""
    tables = [[5, 0, 0], [1, 7, 0], [2, 4, 6]]
    tokens = [(s, p, 100 * s + p) for s, length in enumerate(LENGTHS) for p in range(length)]
    prompts = ForwardBatch(
        [t for _, _, t in tokens], [p for _, p, _ in tokens], [-1] * len(tokens), [s for s, _, _ in tokens], tables, []
    )
    return prompts, ForwardBatch([7, 8, 9], LENGTHS, [-1, 1, 0], [0, 1, 2], tables, [0, 1, 2])


@pytest.fixture
def llama(tiny_base: BaseCheckpoint) -> TorchLlama:
    model = load_quantized(tiny_base, Quantization(compute_dtype="float32"))
    llama = TorchLlama(model, max_model_len=64, max_num_seqs=2, kv_cache_bytes=1 << 20)
    for slot, r in enumerate((4, 16)):
        tensors = random_adapter(model.config, r, seed=slot)
        llama.set_adapter(slot, LoraWeights.from_peft(tensors, 2.0, torch.float32, CPU))
    return llama


def test_a_padded_step_gives_the_same_and_writes_to_no_block_of_a_sequence(llama: TorchLlama) -> None:
    prompts, step = prompts_and_next()
    llama.forward(prompts)
    keys, values = llama._keys.clone(), llama._values.clone()
    expected = llama.forward(step)
    after = llama._keys.clone()
    llama._keys[:], llama._values[:] = keys, values
    logits = llama.forward(pad_batch(step, 8, table_width=4, spare_block=llama.num_blocks))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(llama._keys[:, : llama.num_blocks], after[:, : llama.num_blocks], atol=1e-5)
    assert not torch.equal(llama._keys[:, llama.num_blocks], keys[:, llama.num_blocks])  # the padding went there


def test_recorded_batch_sizes_hold_every_number_of_sequences() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 4]
    assert decode_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert decode_sizes(33)[-1] == 40


def test_attention_over_blocks_is_used_only_where_it_gives_what_gathering_gives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def usable() -> bool:
        return varlen_attn_reads_blocks(CPU, torch.float32, 4, 2, 16)

    assert not usable()  # there is none for CPUs
    right: Callable[..., torch.Tensor] = paged_attention.attend_gathered
    monkeypatch.setattr(paged_attention, "attend_in_blocks", right)
    assert usable()
    caplog.clear()
    monkeypatch.setattr(paged_attention, "attend_in_blocks", lambda *args: right(*args) + 0.2)
    assert not usable()
    assert "its results are off by 0.2" in caplog.text


@pytest.mark.gpu
def test_attention_over_blocks_works_on_this_gpu() -> None:
    assert varlen_attn_reads_blocks(torch.device("cuda"), torch.bfloat16, 32, 8, 128)


def answers_of_one_length(engine: Engine, adapters: list[str | None]) -> dict[str, list[int]]:
    """To prompts that fit one step together, so that all steps after it are of one size."""
    answers = Answers()
    for i, adapter in enumerate(adapters):
        answers.add(engine, EngineRequest(str(i), list(range(10 * i + 1, 10 * i + 31)), greedy(24), adapter))
    drain(engine)
    return answers.tokens


@pytest.mark.gpu
def test_a_replayed_step_gives_what_its_operators_give_also_after_the_stacks_moved() -> None:
    model = random_llama("tiny", torch.device("cuda"), torch.bfloat16)
    engine = Engine(model, max_model_len=512, max_num_seqs=8, max_loras=4)
    llama = engine._llama
    assert isinstance(llama, TorchLlama)
    for name, r in {"r8": 8, "r4": 4, "r64": 64}.items():  # the last makes the stacks larger, at other addresses
        assert engine.load_adapter(name, engine.lora_weights(random_adapter(model.config, r, r), 2.0))
        for adapters in ([None] * 4, [name, None, "r8", name]):
            replayed = answers_of_one_length(engine, adapters)
            graphs = llama._graphs
            assert graphs is not None, "a recording failed"
            llama._graphs = None
            assert answers_of_one_length(engine, adapters) == replayed
            llama._graphs = graphs
