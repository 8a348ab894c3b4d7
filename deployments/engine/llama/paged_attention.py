"""Attention over the paged KV cache in torch's operators: through block tables on CUDA, by gathering them elsewhere."""

import logging
from typing import cast

import torch
import torch.nn.functional as F

from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import NO_ADAPTER
from deployments.engine.llama.step_tensors import StepTensors

logger = logging.getLogger(__name__)

CUDA_BLOCK = 256  # what FlashAttention 2, which varlen_attn calls, reads


def varlen_attn_reads_blocks(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> bool:
    """Whether `varlen_attn` attends through block tables here, and rightly.

    It refuses float32 and GPUs before Ampere, and some releases got paged attention wrong without a word
    (pytorch/pytorch#194167), so a step of three sequences is compared with what gathering the blocks gives.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    blocks = (4, CUDA_BLOCK, num_kv_heads, head_dim)
    batch = ForwardBatch(
        token_ids=[0] * 5,
        positions=[CUDA_BLOCK + 1, 7, 8, 9, 0],
        adapter_slots=[NO_ADAPTER] * 5,
        seq_index=[0, 1, 1, 1, 2],
        block_tables=[[3, 1], [0, 0], [2, 0]],
        output_rows=[],
    )
    step = StepTensors.of(batch, CUDA_BLOCK).to(device)
    q, keys, values = random(5, num_heads, head_dim), random(*blocks), random(*blocks)
    try:
        found = attend_in_blocks(q, keys, values, step)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
    else:
        difference = (found.float() - attend_gathered(q, keys, values, step).float()).abs().max().item()
        if difference < 0.05:  # bfloat16 rounds to 1/256; the mean of many normal values is below 4
            return True
        reason = f"its results are off by {difference:.2g}"
    logger.warning("attention gathers the KV cache, slower: varlen_attn cannot be used here: %s", reason)
    return False


def attend_in_blocks(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepTensors) -> torch.Tensor:
    """q [num_tokens, heads, d] over blocks [num_blocks, block_size, kv_heads, d] -> [num_tokens, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        keys,
        values,
        cu_seq_q=step.starts,
        cu_seq_k=step.kv_starts,
        max_q=step.max_new,
        max_k=step.max_length,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=step.lengths,
        block_table=step.tables,
        num_splits=1,  # the same sums whatever else is in the batch; more are wrong over blocks, see above
    )
    return cast(torch.Tensor, out)


def attend_gathered(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepTensors) -> torch.Tensor:
    """What `attend_in_blocks` gives, on any device and in any dtype."""
    if step.max_new == 1 and len(step.lengths) > 1:
        seen = torch.arange(step.tables.shape[1] * keys.shape[1], device=q.device) < step.lengths[:, None]
        # What lies in the blocks beyond a sequence's end may be another's NaN, which a mask alone lets through.
        k, v = (
            torch.where(seen[:, :, None, None], blocks[step.tables].flatten(1, 2), 0).transpose(1, 2)
            for blocks in (keys, values)
        )
        attended = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=True)
        return attended[:, :, 0]
    outputs = []
    starts, lengths = step.starts.tolist(), step.lengths.tolist()
    for s, (start, end, length) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
        k, v = (blocks[step.tables[s]].flatten(0, 1)[:length].transpose(0, 1)[None] for blocks in (keys, values))
        # A sequence's last token sees everything, and needs no mask.
        mask = None if end - start == 1 else torch.arange(length, device=q.device) <= step.positions[start:end, None]
        queries = q[start:end].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)
