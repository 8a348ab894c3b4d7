"""Keys and values of every running sequence: one row a sequence, as long as the longest context.

The scheduler hands out rows; the forward writes into them and attends over them. Pages of a row that were
never written cost no memory on a CPU.
"""

import torch
from transformers import LlamaConfig


class KVCache:
    """`keys` and `values`: [num_layers, num_rows, max_model_len, num_kv_heads, head_dim] in compute dtype."""

    def __init__(
        self, config: LlamaConfig, num_rows: int, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        shape = (
            config.num_hidden_layers,
            num_rows,
            max_model_len,
            config.num_key_value_heads or config.num_attention_heads,
            head_dim,
        )
        self.max_model_len = max_model_len
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k` and `v` ([num_tokens, num_kv_heads, head_dim]) at (row, position) of each token."""
        self.keys[layer][rows, positions] = k
        self.values[layer][rows, positions] = v
