"""Attention among the tokens of one document, for batches that are documents laid end to end without padding.

`training.trainer.train` trains inside `varlen_forward` and passes `cu_seq_lens` with every batch; forwards without it
get transformers' own SDPA. Nothing is computed across documents, so packing changes no result. Knows nothing of data,
adapters or the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "corral_documents"

# Up to this length a CPU multiplies whole score matrices faster than torch's blockwise kernel, whose backward pass
# takes 4 ms a layer however short the documents are (8 of 35 tokens, 9 heads: 0.9 against 24 ms forward and backward).
_SCORES_UP_TO = 512


@contextmanager
def varlen_forward(model: PreTrainedModel) -> Iterator[None]:
    """In the block, forwards of `model` that are given `cu_seq_lens` keep documents apart.

    Forwards without it see one causal sequence in each row; transformers makes no mask for them.
    """
    AttentionInterface.register(_NAME, _varlen_attention_interface)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key, value: [num_tokens, num_kv_heads, head_dim]; neighbouring query heads share one.
        cu_seq_lens: [num_documents + 1] int32 on the CPU: where each document begins, and the end of the last.
        scale: of the scores before the softmax.

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
        documents = zip(*(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True)
        return torch.cat([_attend(q[None], k[None], v[None], scale)[0] for q, k, v in documents])
    rows, places = _grid(lengths, longest, query.device)
    q, k, v = (_to_grid(tensor, rows, places, len(lengths), longest) for tensor in (query, key, value))
    return _attend(q, k, v, scale)[rows, places]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention over [batch, length, heads, head_dim]; what is padded on the right is seen by padding only."""
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
    """Row and column of every token in a [documents, longest] grid, each [num_tokens]."""
    rows, places = (torch.arange(longest) < lengths[:, None]).nonzero(as_tuple=True)
    return rows.to(device), places.to(device)


def _to_grid(
    tensor: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, num_rows: int, longest: int
) -> torch.Tensor:
    if num_rows * longest == len(tensor):  # all of one length
        return tensor.view(num_rows, longest, *tensor.shape[1:])
    return tensor.new_zeros(num_rows, longest, *tensor.shape[1:]).index_put((rows, places), tensor)


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
    """torch's attention over documents laid end to end (torch >= 2.10, CUDA), None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """[len(lengths) + 1] int32: where documents of these lengths begin when laid end to end, and the total."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
