"""The Llama forward in torch's operators: on CUDA, and on CPUs where cpu_kernels.cpp does not compile.

It borrows the linears, norms and rotary table of a transformers model that `training.base_models.resolve` loaded. On
CUDA, bitsandbytes multiplies by the 4-bit weights in one kernel where that is faster than unpacking them (`gemm_4bit`),
attention reads the paged KV cache through the block table, and decode steps replay CUDA graphs. Elsewhere the blocks
are gathered before attention.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from deployments.engine.llama.cuda_graphs import DecodeGraphs
from deployments.engine.llama.interface import ForwardBatch, num_kv_blocks
from deployments.engine.llama.lora import NO_ADAPTER, LoraStacks, LoraWeights, StackedLora
from deployments.engine.llama.paged_attention import (
    CUDA_BLOCK,
    attend_gathered,
    attend_in_blocks,
    varlen_attn_reads_blocks,
)
from deployments.engine.llama.step_tensors import StepTensors
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaDims

logger = logging.getLogger(__name__)

_BLOCK = 16  # tokens in a KV block


class TorchLlama:
    """A Llama whose linear layers stay in 4 bit."""

    def __init__(self, model: LlamaForCausalLM, *, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int) -> None:
        config = model.config
        self.device = model.device
        self.dtype: torch.dtype = model.model.norm.weight.dtype
        self.vocab_size: int = config.vocab_size
        dims = LlamaDims.of(config.to_dict())
        num_kv_heads, self._head_dim = dims.num_kv_heads, dims.head_dim
        self._eps: float = config.rms_norm_eps
        self._embed_tokens: torch.Tensor = model.model.embed_tokens.weight
        self._norm: torch.Tensor = model.model.norm.weight
        self._lm_head: torch.Tensor = model.lm_head.weight
        self._layers = [_Layer(layer, fuse=self.device.type == "cpu") for layer in model.model.layers]
        cos, sin = model.model.rotary_emb(self._embed_tokens[:1], torch.arange(max_model_len, device=self.device)[None])
        self._cos: torch.Tensor = cos[0, :, None]  # [max_model_len, 1, head_dim]
        self._sin: torch.Tensor = _signed(sin)[0, :, None]
        self._loras = LoraStacks(self.device, self.dtype)
        paged = self.device.type == "cuda" and varlen_attn_reads_blocks(
            self.device, self.dtype, config.num_attention_heads, num_kv_heads, self._head_dim
        )
        self._attend = attend_in_blocks if paged else attend_gathered
        self.block_size = CUDA_BLOCK if paged else _BLOCK
        self.num_blocks = num_kv_blocks(model, self.block_size, max_model_len, max_num_seqs, kv_cache_bytes)
        # One block more, which no sequence holds, for the padding of CUDA graphs.
        shape = (config.num_hidden_layers, self.num_blocks + 1, self.block_size, num_kv_heads, self._head_dim)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._graphs: DecodeGraphs | None = None
        if paged:
            self._graphs = DecodeGraphs(
                self._run,
                device=self.device,
                block_size=self.block_size,
                spare_block=self.num_blocks,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
            )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; [n, hidden] states of `batch.output_rows` after the last norm."""
        stacked = self._loras.stacked if any(slot != NO_ADAPTER for slot in batch.adapter_slots) else None
        hidden = self._replayed(batch, stacked)
        if hidden is None:
            hidden = self._run(StepTensors.of(batch, self.block_size).to(self.device), stacked)
        return F.rms_norm(hidden[batch.output_rows], hidden.shape[-1:], self._norm, self._eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""
        return F.linear(hidden, self._lm_head).float()

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; while a `forward` runs, only a slot that it does not use."""
        self._loras.put(slot, weights)

    def _replayed(self, batch: ForwardBatch, stacked: StackedLora | None) -> torch.Tensor | None:
        """The batch through a CUDA graph; None where there is none for it."""
        if self._graphs is None or not self._graphs.hold(batch):
            return None
        try:
            return self._graphs.run(batch, stacked)
        except RuntimeError:
            logger.warning("decode steps run without CUDA graphs, slower: they cannot be recorded", exc_info=True)
            self._graphs = None
            return None

    def _run(self, step: StepTensors, stacked: StackedLora | None) -> torch.Tensor:
        """All layers; hidden states of all tokens before the last norm, [num_tokens, hidden]."""
        owned = None if stacked is None else stacked.owned_by(step.adapter_slots)

        def adapted(i: int, targets: Sequence[str], linears: _Linears, x: torch.Tensor) -> Sequence[torch.Tensor]:
            outputs = linears(x)
            if stacked is None or owned is None:
                return outputs
            return [stacked.add((i, target), owned, x, y) for target, y in zip(targets, outputs, strict=True)]

        x = F.embedding(step.token_ids, self._embed_tokens)
        cos, sin = self._cos[step.positions], self._sin[step.positions]
        for i, layer in enumerate(self._layers):
            h = F.rms_norm(x, x.shape[-1:], layer.input_norm, self._eps)
            q, k, v = (self._heads(y) for y in adapted(i, LLAMA_LINEARS[:3], layer.qkv, h))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            self._keys[i].flatten(0, 1)[step.kv_rows] = k
            self._values[i].flatten(0, 1)[step.kv_rows] = v
            attended = self._attend(q, self._keys[i], self._values[i], step).flatten(1)
            (o,) = adapted(i, LLAMA_LINEARS[3:4], layer.o, attended)
            x = x + o
            h = F.rms_norm(x, x.shape[-1:], layer.post_norm, self._eps)
            gate, up = adapted(i, LLAMA_LINEARS[4:6], layer.gate_up, h)
            (down,) = adapted(i, LLAMA_LINEARS[6:], layer.down, F.silu(gate) * up)
            x = x + down
        return x

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self._head_dim)


class _Layer:
    """What the forward takes of a transformers layer. `fuse`: linears of the same input become one."""

    def __init__(self, layer: Any, *, fuse: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm: torch.Tensor = layer.input_layernorm.weight
        self.post_norm: torch.Tensor = layer.post_attention_layernorm.weight
        self.qkv = _Linears([attention.q_proj, attention.k_proj, attention.v_proj], fuse=fuse)
        self.o = _Linears([attention.o_proj], fuse=fuse)
        self.gate_up = _Linears([mlp.gate_proj, mlp.up_proj], fuse=fuse)
        self.down = _Linears([mlp.down_proj], fuse=fuse)


class _Linears:
    """4-bit linears of the same input; [num_tokens, in_features] -> one [num_tokens, out_features] for each.

    On a CPU a call costs more than a small batch computes, so they are fused there, unless a forward has run and
    bitsandbytes has repacked them. On CUDA graphs take the calls' cost away, and double quantization stays.
    """

    def __init__(self, linears: list[Any], *, fuse: bool) -> None:
        self._sizes = [linear.out_features for linear in linears]
        repacked = any(getattr(linear.weight.quant_state, "packing_format_for_cpu", False) for linear in linears)
        self._linears = [_fused(linears)] if fuse and len(linears) > 1 and not repacked else linears

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        if len(self._linears) == len(self._sizes):
            return [linear(x) for linear in self._linears]
        y: torch.Tensor = self._linears[0](x)
        return torch.split(y, self._sizes, dim=-1)


def _fused(linears: list[Any]) -> Any:
    """One 4-bit linear with the rows of several, which dequantizes to the same bits; their own weights are freed."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise
    from bitsandbytes.nn import Linear4bit, Params4bit

    states = [linear.weight.quant_state for linear in linears]
    absmax = [
        dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        for state in states
    ]
    num_rows, first = sum(state.shape[0] for state in states), states[0]
    state = QuantState(
        absmax=torch.cat(absmax).float(),
        shape=torch.Size((num_rows, first.shape[1])),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
    kind = {"quant_type": first.quant_type}
    fused = Linear4bit(
        first.shape[1], num_rows, bias=False, compute_dtype=linears[0].compute_dtype, device="meta", **kind
    ).eval()
    data = torch.cat([linear.weight.data.view(-1, 1) for linear in linears])
    fused.support_avx512bf16_for_cpu = linears[0].support_avx512bf16_for_cpu  # off where the model computes in float32
    fused.weight = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, **kind)
    for linear in linears:
        linear.weight.data = torch.empty(0, dtype=torch.uint8)
    return fused


def _signed(sin: torch.Tensor) -> torch.Tensor:
    """The sine table as `_rotate` takes it: its first half negative."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama's released weights."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin
