"""The interface of a Llama forward pass: `Llama`, and the `ForwardBatch` that it computes.

Imports no backend; knows nothing of requests or sampling.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import LlamaForCausalLM

from deployments.engine.llama.lora import LoraWeights
from training.base_models.llama_shape import LlamaDims


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """New tokens of several sequences; the tokens of one sequence are consecutive and in order.

    Attributes:
        token_ids: [num_tokens]
        positions: [num_tokens], position of each token in its sequence; all earlier tokens are in the KV cache or in
            the batch.
        adapter_slots: [num_tokens], adapter slot of each token, NO_ADAPTER for the base.
        seq_index: [num_tokens], each token's row of `block_tables`: 0, 1, ... in order.
        block_tables: [num_sequences, width], the KV blocks of each sequence, padded to the same width.
        output_rows: [n], indices of the tokens whose hidden states are returned.
    """

    token_ids: list[int]
    positions: list[int]
    adapter_slots: list[int]
    seq_index: list[int]
    block_tables: list[list[int]]
    output_rows: list[int]


class Llama(Protocol):
    """A base model with its KV cache and adapter slots."""

    block_size: int  # tokens in a KV block
    num_blocks: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; [n, hidden_size] states of `batch.output_rows` after the last norm."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or clear the slot; a running `forward` must not be using it."""


def num_kv_blocks(
    model: LlamaForCausalLM, block_size: int, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int
) -> int:
    """Number of KV blocks that fit into `kv_cache_bytes`; at least one sequence's, at most what all can fill."""
    dims = LlamaDims.of(model.config.to_dict())
    per_token = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * model.dtype.itemsize
    one_sequence = -(-max_model_len // block_size)
    return max(one_sequence, min(kv_cache_bytes // (per_token * block_size), one_sequence * max_num_seqs))
