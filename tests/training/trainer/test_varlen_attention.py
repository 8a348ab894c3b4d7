"""Attention among the tokens of one document."""

import pytest
import torch
from torch.nn import functional as F

from training.trainer.varlen_attention import cumulative, varlen_attention

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """torch's own attention, a document at a time."""
    out = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def check(lengths: list[int], device: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], device=device, dtype=dtype)
    results = []
    for attended in (
        varlen_attention(tensors[0], tensors[1], tensors[2], cumulative(lengths), HEAD_DIM**-0.5),
        one_by_one(tensors[0], tensors[1], tensors[2], lengths),
    ):
        results.append([attended, *torch.autograd.grad(attended, tensors, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 9, 4, 30], [600, 3], [40, 1, 1, 1, 1, 1, 1, 1, 1]])
def test_documents_do_not_see_each_other_forward_and_backward(lengths: list[int]) -> None:
    check(lengths, "cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 9, 4, 30], [600, 3]])
def test_documents_do_not_see_each_other_on_a_gpu(lengths: list[int]) -> None:
    check(lengths, "cuda", torch.bfloat16, 3e-2)
