"""Variable-length attention, for padding-free batches: sequences concatenated into one row.

Inside `varlen_forward`, batches that pass `cu_seq_lens` attend only within each sequence, so packing does not change
any result; forward passes without it use transformers' own SDPA. Knows nothing of data, adapters or the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "corral_varlen"

# Up to this length full score matrices are faster on a CPU than torch's blockwise kernel, whose backward pass takes
# 4 ms a layer however short the sequences are (8 of 35 tokens, 9 heads: 0.9 instead of 24 ms forward and backward).
_SCORES_UP_TO = 512


@contextmanager
def varlen_forward(model: PreTrainedModel) -> Iterator[None]:
    """In the block, forward passes of `model` with `cu_seq_lens` attend only within each sequence.

    Without it each row is one causal sequence, for which transformers builds no mask.
    """
    AttentionInterface.register(_NAME, _varlen_attention_interface)
    original = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(original)


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key, value: [num_tokens, num_kv_heads, head_dim]; adjacent query heads share one.
        cu_seq_lens: [num_seqs + 1] int32 on the CPU: where each sequence starts, and the end of the last.
        scale: factor of the scores before the softmax.

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    lengths = cu_seq_lens.diff()
    longest = int(lengths.max())
    if query.is_cuda and (varlen := _varlen_attn()) is not None:
        starts = cu_seq_lens.to(query.device, non_blocking=True)
        options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": key.shape[1] != query.shape[1]}
        out: torch.Tensor = varlen(query, key, value, starts, starts, longest, longest, **options)
        return out
    if longest * len(lengths) > 2 * len(query):  # padding would be most of the work
        sequences = zip(*(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True)
        return torch.cat([_attend(q[None], k[None], v[None], scale)[0] for q, k, v in sequences])
    rows, columns = _grid(lengths, longest, query.device)
    q, k, v = (_to_grid(tensor, rows, columns, len(lengths), longest) for tensor in (query, key, value))
    return _attend(q, k, v, scale)[rows, columns]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention over [batch, length, heads, head_dim]; padding is on the right, so only it attends to itself."""
    batch, length, heads, head_dim = query.shape
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.is_cuda or length > _SCORES_UP_TO:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    groups = key.shape[1]
    grouped = (batch, groups, heads // groups * length)
    scores = (query.reshape(*grouped, head_dim) @ key.transpose(-1, -2)) * scale
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = scores.view(batch, heads, length, length).masked_fill(future, -torch.inf)
    weights = scores.float().softmax(-1).to(query.dtype)
    return (weights.view(*grouped, length) @ value).view(batch, heads, length, head_dim).transpose(1, 2)


def _grid(lengths: torch.Tensor, longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every token in a [num_seqs, longest] grid, each [num_tokens]."""
    rows, columns = (torch.arange(longest) < lengths[:, None]).nonzero(as_tuple=True)
    return rows.to(device), columns.to(device)


def _to_grid(
    tensor: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, num_rows: int, longest: int
) -> torch.Tensor:
    if num_rows * longest == len(tensor):  # all sequences are equally long
        return tensor.view(num_rows, longest, *tensor.shape[1:])
    return tensor.new_zeros(num_rows, longest, *tensor.shape[1:]).index_put((rows, columns), tensor)


def _varlen_attention_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' interface: query [1, num_heads, num_tokens, head_dim] -> [1, num_tokens, num_heads, head_dim]."""
    if cu_seq_lens is None:
        attended: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return varlen_attention(q, k, v, cu_seq_lens, scale)[None], None


@cache
def _varlen_attn() -> Any:
    """torch's variable-length attention (torch >= 2.10, CUDA), or None if this torch lacks it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """`cu_seq_lens` of concatenated sequences: [len(lengths) + 1] int32, where each starts, and the total length."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
