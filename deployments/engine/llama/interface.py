"""What the engine asks of a Llama forward: `Llama`, and the `ForwardBatch` that it computes. Imports no backend.

Knows nothing of requests or sampling.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import LlamaForCausalLM

from deployments.engine.llama.lora import LoraWeights
from training.base_models.llama_shape import LlamaDims


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """New tokens of several sequences; those of one sequence are neighbours, in order.

    Attributes:
        token_ids: [num_tokens]
        positions: [num_tokens], each token's place in its sequence; all before it are in the KV cache or in the batch.
        adapter_slots: [num_tokens], the adapter slot of each, NO_ADAPTER for the base.
        seq_index: [num_tokens], row of `block_tables`; 0, 1, ... in order.
        block_tables: the KV blocks of each sequence, all rows equally long.
        output_rows: tokens whose hidden state is wanted.
    """

    token_ids: list[int]
    positions: list[int]
    adapter_slots: list[int]
    seq_index: list[int]
    block_tables: list[list[int]]
    output_rows: list[int]


class Llama(Protocol):
    """The base, its KV cache and its adapter slots."""

    block_size: int  # tokens in a KV block
    num_blocks: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; hidden states of `output_rows` after the last norm."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; while a `forward` runs, only a slot that it does not use."""


def num_kv_blocks(
    model: LlamaForCausalLM, block_size: int, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int
) -> int:
    """How many KV blocks the memory has room for, no more than the sequences could fill, and enough for one."""
    dims = LlamaDims.of(model.config.to_dict())
    per_token = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * model.dtype.itemsize
    one_sequence = -(-max_model_len // block_size)
    return max(one_sequence, min(kv_cache_bytes // (per_token * block_size), one_sequence * max_num_seqs))
