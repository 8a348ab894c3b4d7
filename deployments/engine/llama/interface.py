"""What the engine asks of a Llama forward, and the choice between the two that there are.

`cpu_llama.py` runs compiled kernels on CPUs, `torch_llama.py` torch's operators on CUDA and wherever the kernels do not
compile. Both multiply by the NF4 weights that training used. Knows nothing of requests or sampling.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.engine.llama.lora import LoraWeights

logger = logging.getLogger(__name__)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_CPU_KV_CACHE_BYTES = 1 << 30
_CUDA_KV_CACHE_SHARE = 0.9  # the rest is for activations, graphs and adapters


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """New tokens of several sequences; those of one sequence are neighbours, in order.

    Attributes:
        token_ids: [num_tokens]
        positions: [num_tokens], each token's place in its sequence; all before it are in the KV cache or in the batch.
        slots: [num_tokens], the adapter slot of each, NO_ADAPTER for the base.
        sequences: [num_tokens], row of `block_tables`; 0, 1, ... in order.
        block_tables: the KV blocks of each sequence, all rows equally long.
        out_rows: tokens whose hidden state is wanted.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sequences: list[int]
    block_tables: list[list[int]]
    out_rows: list[int]


class Llama(Protocol):
    """The base, its KV cache and its adapter slots."""

    block_size: int  # tokens in a KV block
    num_blocks: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; hidden states of `out_rows` after the last norm."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; while a `forward` runs, only a slot that it does not use."""


def kv_sizes(config: LlamaConfig) -> tuple[int, int]:
    """Key-value heads, and numbers in each head."""
    return (
        config.num_key_value_heads or config.num_attention_heads,
        config.head_dim or config.hidden_size // config.num_attention_heads,
    )


def num_kv_blocks(
    model: LlamaForCausalLM, block_size: int, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int
) -> int:
    """How many KV blocks the memory has room for, no more than the sequences could fill, and enough for one."""
    num_kv_heads, head_dim = kv_sizes(model.config)
    per_token = 2 * model.config.num_hidden_layers * num_kv_heads * head_dim * model.dtype.itemsize
    one_sequence = -(-max_model_len // block_size)
    return max(one_sequence, min(kv_cache_bytes // (per_token * block_size), one_sequence * max_num_seqs))


def load_llama(
    model: LlamaForCausalLM, *, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int | None, max_loras: int
) -> Llama:
    """The fastest forward that runs here. `model` is a transformers Llama in NF4; its weights are taken over."""
    from deployments.engine.llama.cpu_kernels import KernelsUnavailable
    from deployments.engine.llama.cpu_llama import CpuLlama
    from deployments.engine.llama.torch_llama import TorchLlama

    if kv_cache_bytes is None:
        kv_cache_bytes = _spare_bytes(model.device)
    sizes = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "kv_cache_bytes": kv_cache_bytes}
    if model.device.type == "cpu":
        try:
            return CpuLlama(model, **sizes, max_loras=max_loras)
        except KernelsUnavailable as reason:
            logger.warning("the CPU kernels are not used, torch's operators are, several times slower: %s", reason)
    return TorchLlama(model, **sizes)


def _spare_bytes(device: torch.device) -> int:
    """What a KV cache may take when nobody says: a gibibyte on a CPU, on CUDA most of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_KV_CACHE_SHARE)
    return _CPU_KV_CACHE_BYTES
