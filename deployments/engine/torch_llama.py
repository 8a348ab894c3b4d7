"""The Llama forward in torch's operators: on CUDA, and on CPUs where cpu_kernels.cpp does not compile.

It borrows the linears, norms and rotary table of a transformers model that `training.base_models` loaded. On CUDA,
attention reads the paged KV cache through the block table (`varlen_attn`); elsewhere the blocks are gathered first.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from deployments.engine.llama import TARGETS, ForwardBatch, kv_sizes
from deployments.engine.lora import NO_ADAPTER, LoraWeights


@dataclass(frozen=True, slots=True)
class _Stack:
    """All loaded adapters for one linear: `a` [sum_r, in], `b` [sum_r, out], `owner` [sum_r] the column's slot."""

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor


class _LoraBatch:
    """The adapters of one step. The A matrices of all loaded adapters are one matrix, likewise B: multiply by the
    whole stack, zero the columns of other tokens' adapters with a 0/1 mask, multiply by the stacked B. Exact for any
    mix and any ranks, without a loop over adapters."""

    def __init__(self, stacks: dict[tuple[int, str], _Stack], token_slots: torch.Tensor) -> None:
        self._stacks = stacks
        self._token_slots = token_slots  # [num_tokens]
        self._masks: dict[int, torch.Tensor] = {}

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` plus each token's own adapter applied to `x` ([num_tokens, in] -> [num_tokens, out])."""
        stack = self._stacks.get((layer, target))
        if stack is None:
            return y
        mask = self._masks.get(id(stack.owner))
        if mask is None:
            mask = self._masks[id(stack.owner)] = self._token_slots[:, None] == stack.owner
        # Not a product with the mask: NaN or infinity of one token's adapter would reach its neighbours.
        return y + torch.where(mask, x @ stack.a.T, 0) @ stack.b


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a batch's tokens lie, as tensors; built once a step and used by every layer."""

    positions: torch.Tensor  # [num_tokens]
    slots: torch.Tensor  # [num_tokens] row of the flattened cache that a token's key and value go to
    tables: torch.Tensor  # [num_sequences, table_width]
    starts: torch.Tensor  # [num_sequences + 1] first token of each sequence
    lengths: torch.Tensor  # [num_sequences] tokens in the cache after this step
    max_new: int
    max_length: int


class TorchLlama:
    """A Llama whose linear layers stay in 4 bit."""

    block_size = 16

    def __init__(self, model: LlamaForCausalLM, *, max_model_len: int, num_blocks: int, max_loras: int) -> None:
        config = model.config
        self.device = model.device
        self.dtype: torch.dtype = model.model.norm.weight.dtype
        self.vocab_size: int = config.vocab_size
        num_kv_heads, self._head_dim = kv_sizes(config)
        self._eps: float = config.rms_norm_eps
        self._embed_tokens: torch.Tensor = model.model.embed_tokens.weight
        self._norm: torch.Tensor = model.model.norm.weight
        self._lm_head: torch.Tensor = model.lm_head.weight
        self._layers: list[Any] = list(model.model.layers)
        if self.device.type == "cuda":  # varlen_attn takes pages of 256 tokens
            self.block_size = 256
            num_blocks = -(-num_blocks * TorchLlama.block_size // self.block_size)
        self.num_blocks = num_blocks
        shape = (config.num_hidden_layers, num_blocks, self.block_size, num_kv_heads, self._head_dim)
        self._keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        cos, sin = model.model.rotary_emb(self._embed_tokens[:1], torch.arange(max_model_len, device=self.device)[None])
        self._cos: torch.Tensor = cos[0, :, None]  # [max_model_len, 1, head_dim]
        self._sin: torch.Tensor = sin[0, :, None]
        self._adapters: dict[int, LoraWeights] = {}
        self._stacks: dict[tuple[int, str], _Stack] = {}

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; hidden states of `batch.out_rows` after the last norm, [n, hidden]."""
        places = self._places(batch)
        lora = None
        if any(slot != NO_ADAPTER for slot in batch.slots):
            lora = _LoraBatch(self._stacks, torch.tensor(batch.slots, device=self.device))
        x = F.embedding(torch.tensor(batch.token_ids, device=self.device), self._embed_tokens)
        cos, sin = self._cos[places.positions], self._sin[places.positions]
        for i, layer in enumerate(self._layers):
            attention = layer.self_attn
            h = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, self._eps)
            q = _rotate(self._heads(_linear(i, "q_proj", attention.q_proj, h, lora)), cos, sin)
            k = _rotate(self._heads(_linear(i, "k_proj", attention.k_proj, h, lora)), cos, sin)
            v = self._heads(_linear(i, "v_proj", attention.v_proj, h, lora))
            self._keys[i].flatten(0, 1)[places.slots] = k
            self._values[i].flatten(0, 1)[places.slots] = v
            attended = self._attend(q, self._keys[i], self._values[i], places)
            x = x + _linear(i, "o_proj", attention.o_proj, attended.flatten(1), lora)
            h = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, self._eps)
            gate = _linear(i, "gate_proj", layer.mlp.gate_proj, h, lora)
            up = _linear(i, "up_proj", layer.mlp.up_proj, h, lora)
            x = x + _linear(i, "down_proj", layer.mlp.down_proj, F.silu(gate) * up, lora)
        out: torch.Tensor = F.rms_norm(x[batch.out_rows], x.shape[-1:], self._norm, self._eps)
        return out

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""
        return F.linear(hidden, self._lm_head).float()

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; while a `forward` runs, only a slot that it does not use."""
        self._adapters.pop(slot, None)
        if weights is not None:
            self._adapters[slot] = weights
        stacks: dict[tuple[int, str], _Stack] = {}
        owners: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}  # places with the same columns share one owner
        for place in [(i, target) for i in range(len(self._layers)) for target in TARGETS]:
            parts = [(s, *w.pairs[place]) for s, w in sorted(self._adapters.items()) if place in w.pairs]
            if not parts:
                continue
            columns = tuple((s, len(a)) for s, a, _ in parts)
            if columns not in owners:
                owners[columns] = torch.tensor([s for s, r in columns for _ in range(r)], device=self.device)
            a = torch.cat([a for _, a, _ in parts])
            b = torch.cat([b * self._adapters[s].scaling for s, _, b in parts])
            stacks[place] = _Stack(a, b, owners[columns])
        self._stacks = stacks

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self._head_dim)

    def _places(self, batch: ForwardBatch) -> _Places:
        size = self.block_size
        starts = [i for i, s in enumerate(batch.sequences) if i == 0 or s != batch.sequences[i - 1]]
        ends = [*starts[1:], len(batch.sequences)]
        lengths = [batch.positions[end - 1] + 1 for end in ends]
        slots = [
            batch.block_tables[s][p // size] * size + p % size
            for s, p in zip(batch.sequences, batch.positions, strict=True)
        ]

        def tensor(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        return _Places(
            positions=tensor(batch.positions),
            slots=tensor(slots),
            tables=tensor(batch.block_tables, torch.int32),
            starts=tensor([*starts, len(batch.sequences)], torch.int32),
            lengths=tensor(lengths, torch.int32),
            max_new=max(end - start for start, end in zip(starts, ends, strict=True)),
            max_length=max(lengths),
        )

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: _Places) -> torch.Tensor:
        """q [num_tokens, heads, d] over pages [num_blocks, block_size, kv_heads, d] -> [num_tokens, heads, d]."""
        if self.device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(
                q,
                keys,
                values,
                cu_seq_q=places.starts,
                cu_seq_k=None,
                max_q=places.max_new,
                max_k=places.max_length,
                window_size=(-1, 0),
                enable_gqa=True,
                seqused_k=places.lengths,
                block_table=places.tables,
                num_splits=1,  # the same sums whatever else is in the batch
            )
            return cast(torch.Tensor, out)
        if places.max_new == 1:
            seen = torch.arange(places.tables.shape[1] * self.block_size) < places.lengths[:, None]
            # What lies in the blocks beyond a sequence's end may be another's NaN, which a mask alone lets through.
            k, v = (
                torch.where(seen[:, :, None, None], pages[places.tables].flatten(1, 2), 0).transpose(1, 2)
                for pages in (keys, values)
            )
            attended = F.scaled_dot_product_attention(
                q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=True
            )
            return attended[:, :, 0]
        outputs = []
        for s, (start, end) in enumerate(zip(places.starts[:-1].tolist(), places.starts[1:].tolist(), strict=True)):
            length = int(places.lengths[s])
            k, v = (pages[places.tables[s]].flatten(0, 1)[:length].transpose(0, 1)[None] for pages in (keys, values))
            mask = torch.arange(length) <= places.positions[start:end, None]
            queries = q[start:end].transpose(0, 1)[None]
            outputs.append(
                F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
            )
        return torch.cat(outputs)


def _linear(i: int, target: str, linear: Any, x: torch.Tensor, lora: _LoraBatch | None) -> torch.Tensor:
    y: torch.Tensor = linear(x)
    return y if lora is None else lora.add(i, target, x, y)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama's released weights."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
