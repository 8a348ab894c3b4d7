"""The Llama forward on a CPU: weights packed for cpu_kernels.cpp, and one call a step.

`llama.load_llama` chooses it where the kernels compile. Weights stay in NF4 with double quantization, 4.13 bits a
parameter, and dequantize to the bits that training used.
"""

import ctypes
from typing import Any

import torch
from transformers import LlamaForCausalLM

from deployments.engine.llama import cpu_kernels
from deployments.engine.llama.cpu_kernels import COLUMNS, GROUP, PAGE, KernelsUnavailable, Layer, Linear, Lora
from deployments.engine.llama.interface import ForwardBatch, num_kv_blocks
from deployments.engine.llama.lora import LoraWeights
from training.base_models.llama_shape import LLAMA_LINEARS, LlamaDims, module_path


class CpuLlama:
    """A Llama whose linear layers stay in 4 bit. Takes the weights out of `model`, which cannot be used afterwards."""

    block_size = PAGE

    def __init__(
        self, model: LlamaForCausalLM, *, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int, max_loras: int
    ) -> None:
        self.dtype: torch.dtype = model.model.norm.weight.dtype
        self.device = torch.device("cpu")
        config = model.config
        self.num_blocks = num_kv_blocks(model, PAGE, max_model_len, max_num_seqs, kv_cache_bytes)
        self.vocab_size: int = config.vocab_size
        dims = LlamaDims.of(config.to_dict())
        num_kv_heads, head_dim = dims.num_kv_heads, dims.head_dim
        self._check(model, head_dim)
        suffix = "bf16" if self.dtype == torch.bfloat16 else "f32"
        kernels = cpu_kernels.load_kernels()
        self._forward = kernels[f"forward_{suffix}"]
        self._logits = kernels[f"logits_{suffix}"]
        self._dequantize = kernels[f"dequantize_{suffix}"]
        self._hidden_size: int = config.hidden_size

        self._kept: list[torch.Tensor] = []  # everything that the structures point at
        self._num_linear_bytes = 0
        shape = (config.num_hidden_layers, self.num_blocks, num_kv_heads, head_dim * PAGE)
        self._keys, self._values = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)
        self._layers = (Layer * config.num_hidden_layers)()
        for i, layer in enumerate(model.model.layers):
            for t, linear in enumerate(LLAMA_LINEARS):
                self._layers[i].linears[t] = self._packed(layer.get_submodule(module_path(linear)))
            self._layers[i].input_norm = self._keep(layer.input_layernorm.weight.float())
            self._layers[i].post_norm = self._keep(layer.post_attention_layernorm.weight.float())
            self._layers[i].keys = self._keys[i].data_ptr()
            self._layers[i].values = self._values[i].data_ptr()
        self._loras = (Lora * (max_loras * config.num_hidden_layers * len(LLAMA_LINEARS)))()
        self._lora_weights: dict[int, LoraWeights] = {}

        # In float32: transformers rounds the table to the compute dtype.
        positions = torch.arange(max_model_len)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        self._model = cpu_kernels.Model(
            layers=ctypes.addressof(self._layers),
            loras=ctypes.addressof(self._loras),
            embed_tokens=self._keep(model.model.embed_tokens.weight),
            lm_head=self._keep(model.lm_head.weight),
            norm=self._keep(model.model.norm.weight.float()),
            cos=self._keep(cos[0, :, : head_dim // 2].float()),
            sin=self._keep(sin[0, :, : head_dim // 2].float()),
            eps=config.rms_norm_eps,
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab=config.vocab_size,
            max_rank=1,
            num_threads=torch.get_num_threads(),
        )

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Run the batch and extend the KV cache; [n, hidden] states of `batch.output_rows` after the last norm."""
        out = torch.empty(len(batch.output_rows), self._hidden_size, dtype=self.dtype)
        tensors = [
            torch.tensor(values, dtype=torch.int32)
            for values in (
                batch.token_ids,
                batch.positions,
                batch.adapter_slots,
                batch.seq_index,
                batch.block_tables,
                batch.output_rows,
            )
        ]
        pointers = [t.data_ptr() for t in tensors]
        width = len(batch.block_tables[0])
        call = cpu_kernels.Batch(len(batch.token_ids), len(batch.output_rows), width, *pointers, out.data_ptr())
        self._forward(ctypes.byref(self._model), ctypes.byref(call))
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size] in float32."""
        hidden = hidden.contiguous()
        out = torch.empty(len(hidden), self.vocab_size)
        self._logits(
            ctypes.byref(self._model), ctypes.c_void_p(hidden.data_ptr()), len(hidden), ctypes.c_void_p(out.data_ptr())
        )
        return out

    def set_adapter(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; while a `forward` runs, only a slot that it does not use."""
        per_layer = len(LLAMA_LINEARS)
        num_layers = len(self._layers)
        for i in range(num_layers):
            for t, target in enumerate(LLAMA_LINEARS):
                pair = weights.pairs.get((i, target)) if weights is not None else None
                entry = self._loras[(slot * num_layers + i) * per_layer + t]
                entry.a, entry.b, entry.scaling, entry.r = (
                    (None, None, 0.0, 0)
                    if pair is None or weights is None
                    else (pair[0].data_ptr(), pair[1].data_ptr(), weights.scaling, len(pair[0]))
                )
        if weights is None:
            self._lora_weights.pop(slot, None)
        else:
            self._lora_weights[slot] = weights
            self._model.max_rank = max(w.max_rank for w in self._lora_weights.values())

    def dequantized(self, layer: int, target: str) -> torch.Tensor:
        """The weight that the forward multiplies by, [out_features, in_features] in float32."""
        linear = self._layers[layer].linears[LLAMA_LINEARS.index(target)]
        out = torch.empty(linear.n, linear.k)
        self._dequantize(ctypes.byref(linear), ctypes.c_void_p(out.data_ptr()))
        return out

    def linear_bytes(self) -> int:
        """Memory of all 4-bit linear layers."""
        return self._num_linear_bytes

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _packed(self, linear: Any) -> Linear:
        """The codes in the order of `struct Linear`, absmax as it is; the layer's own copy of the codes is freed."""
        state = linear.weight.quant_state
        n, k = state.shape
        raw = linear.weight.data.reshape(n, k // 2).view(torch.uint8)
        codes = torch.stack((raw >> 4, raw & 15), dim=-1).reshape(n // 32, 2, 2, 8, k // 2, 2)
        low, high = codes[:, :, 0], codes[:, :, 1]  # outputs 0-7 and 8-15 of every 16
        packed = (low | (high << 4)).permute(0, 3, 1, 2, 4).contiguous()  # [n / 32, k / 2, 2, 8, 2]
        linear.weight.data = torch.empty(0, dtype=torch.uint8)
        if state.nested:
            tensors = [packed, state.absmax, state.state2.code.float(), state.state2.absmax.float()]
            pointers = [self._keep(t) for t in tensors]
            self._num_linear_bytes += sum(t.numel() * t.element_size() for t in tensors if t is not tensors[2])
            return Linear(*pointers, float(state.offset), n, k)
        absmax = state.absmax.float()
        self._num_linear_bytes += packed.numel() + absmax.numel() * 4
        return Linear(self._keep(packed), None, None, self._keep(absmax), 0.0, n, k)

    @staticmethod
    def _check(model: LlamaForCausalLM, head_dim: int) -> None:
        """Refuse what the kernels do not do.

        Raises:
            KernelsUnavailable: a shape, dtype or quantization that they are not written for.
        """
        config = model.config
        dtype = model.model.norm.weight.dtype
        if dtype not in (torch.bfloat16, torch.float32):
            raise KernelsUnavailable(f"they compute in bfloat16 or float32, not {dtype}")
        if head_dim % 16 or config.hidden_size % GROUP or config.intermediate_size % GROUP or config.vocab_size % 4:
            raise KernelsUnavailable("the model's sizes are not multiples of 64")
        for layer in model.model.layers:
            for target in LLAMA_LINEARS:
                linear = layer.get_submodule(module_path(target))
                state = getattr(linear.weight, "quant_state", None)
                if state is None or state.quant_type != "nf4" or state.blocksize != GROUP or linear.bias is not None:
                    raise KernelsUnavailable(f"{target} is not NF4 in groups of {GROUP} without bias")
                if state.nested and state.state2.blocksize != 256:
                    raise KernelsUnavailable(f"{target} has absmax groups of {state.state2.blocksize}, not 256")
                if (
                    state.shape[0] % COLUMNS
                    or state.shape[1] % GROUP
                    or getattr(state, "packing_format_for_cpu", False)
                ):
                    raise KernelsUnavailable(f"{target} of shape {tuple(state.shape)} cannot be packed")
