"""The Llama forward over NF4 weights, for a batch of chunks: whole prompts, parts of prompts, single tokens.

It borrows the linears, norms and rotary table of a transformers model that `training.base_models` loaded, so
serving multiplies by the very bits that training did. Knows nothing of requests or sampling.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from deployments.engine.kv_cache import KVCache
from deployments.engine.lora import LoraBatch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive new tokens of one sequence.

    Attributes:
        row: the sequence's row in the KV cache.
        start: position of the first token; everything before it is in the cache already.
        token_ids: at least one.
    """

    row: int
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a chunk of several tokens lies in the batch, and which of its keys each token may see."""

    tokens: slice
    row: int
    end: int
    mask: torch.Tensor | None  # [num_tokens, end], None when plain causal


class Llama:
    """A Llama whose linear layers stay in 4 bit."""

    def __init__(self, model: LlamaForCausalLM, max_model_len: int) -> None:
        self.config = model.config
        self.device = model.device
        self.dtype: torch.dtype = model.model.norm.weight.dtype
        self.head_dim: int = self.config.head_dim or self.config.hidden_size // self.config.num_attention_heads
        self._eps: float = self.config.rms_norm_eps
        self._embed_tokens: torch.Tensor = model.model.embed_tokens.weight
        self._norm: torch.Tensor = model.model.norm.weight
        self._lm_head: torch.Tensor = model.lm_head.weight
        self._layers: list[Any] = list(model.model.layers)
        positions = torch.arange(max_model_len, device=self.device)[None]
        cos, sin = model.model.rotary_emb(self._embed_tokens[:1], positions)
        self._cos: torch.Tensor = cos[0, :, None]  # [max_model_len, 1, head_dim]
        self._sin: torch.Tensor = sin[0, :, None]

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], cache: KVCache, lora: LoraBatch | None) -> torch.Tensor:
        """Run the chunks and extend the cache.

        Returns hidden states after the last norm, [num_tokens, hidden_size], chunks in the order given.
        Chunks of several tokens must come before chunks of one.
        """
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.end)], device=self.device)
        rows = torch.tensor([c.row for c in chunks for _ in c.token_ids], device=self.device)
        spans = self._spans(chunks)
        num_span_tokens = spans[-1].tokens.stop if spans else 0
        decode_rows = rows[num_span_tokens:]
        decode_end = max((c.end for c in chunks if len(c.token_ids) == 1), default=0)
        decode_mask = (torch.arange(decode_end, device=self.device) <= positions[num_span_tokens:, None])[:, None, None]

        x = F.embedding(torch.tensor(token_ids, device=self.device), self._embed_tokens)
        cos, sin = self._cos[positions], self._sin[positions]
        for i, layer in enumerate(self._layers):
            h = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, self._eps)
            attention = layer.self_attn
            q = _rotate(
                self._linear(i, "q_proj", attention.q_proj, h, lora).unflatten(-1, (-1, self.head_dim)), cos, sin
            )
            k = _rotate(
                self._linear(i, "k_proj", attention.k_proj, h, lora).unflatten(-1, (-1, self.head_dim)), cos, sin
            )
            v = self._linear(i, "v_proj", attention.v_proj, h, lora).unflatten(-1, (-1, self.head_dim))
            cache.write(i, rows, positions, k, v)
            keys, values = cache.keys[i], cache.values[i]

            outputs = [_attend_span(q[s.tokens], keys[s.row, : s.end], values[s.row, : s.end], s.mask) for s in spans]
            if decode_end:
                decode_keys, decode_values = keys[decode_rows, :decode_end], values[decode_rows, :decode_end]
                outputs.append(_attend_rows(q[num_span_tokens:], decode_keys, decode_values, decode_mask))
            x = x + self._linear(i, "o_proj", attention.o_proj, torch.cat(outputs).flatten(1), lora)

            h = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, self._eps)
            gate = self._linear(i, "gate_proj", layer.mlp.gate_proj, h, lora)
            up = self._linear(i, "up_proj", layer.mlp.up_proj, h, lora)
            x = x + self._linear(i, "down_proj", layer.mlp.down_proj, F.silu(gate) * up, lora)
        return F.rms_norm(x, x.shape[-1:], self._norm, self._eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, vocab_size] in float32."""
        return F.linear(hidden, self._lm_head).float()

    @staticmethod
    def _linear(i: int, target: str, linear: Any, x: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        y: torch.Tensor = linear(x)
        return y if lora is None else lora.add(i, target, x, y)

    def _spans(self, chunks: list[Chunk]) -> list[_Span]:
        spans, offset = [], 0
        for chunk in chunks:
            n = len(chunk.token_ids)
            if n > 1:
                mask = None
                if chunk.start:
                    seen = torch.arange(chunk.start, chunk.end, device=self.device)
                    mask = torch.arange(chunk.end, device=self.device) <= seen[:, None]
                spans.append(_Span(slice(offset, offset + n), chunk.row, chunk.end, mask))
            offset += n
        return spans


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama's released weights."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend_span(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One sequence: q [n, heads, d], k and v [end, kv_heads, d] -> [n, heads, d]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def _attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One new token a sequence: q [n, heads, d], k and v [n, end, kv_heads, d] -> [n, heads, d]."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]
