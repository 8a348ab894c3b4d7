"""FSDP-QLoRA: every worker holds a shard of each layer of the 4-bit base, and gathers a layer only while it runs.

Adapters, embeddings, norms and lm_head are replicated, as without sharding. All ranks must take part in every forward
pass, equally often; backward passes may follow. Knows nothing of data, adapters or the trainer.

This is not torch's FSDP, which shards floating-point parameters: it would treat the 4-bit codes as bfloat16 numbers
(`bnb_4bit_quant_storage`), replicate their scales on every worker, and refuse float32 adapters beside them. Here raw
bytes are gathered, bit for bit as they were quantized.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from training.base_models.nf4 import (
    Quantization,
    bitsandbytes_config,
    compute_dtype_on,
    forbid_packed_cpu_kernel,
    quiet_loading,
)
from training.base_models.resolve import BaseCheckpoint

# The name up to torch 2.12, `all_gather_into_tensor`, is deprecated since.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_ALIGNMENT = 16  # bytes: enough for any dtype and any vector load of a CUDA kernel


def load_sharded(base: BaseCheckpoint, quantization: Quantization, device: torch.device) -> LlamaForCausalLM:
    """`training.base_models.nf4.load_quantized`, with decoder layers sharded over all ranks of torch.distributed.

    Layers are read, quantized on `device` and cut to this rank's shard one at a time: a device never holds more than
    two. The weights are the same to the bit, and the model is called in the same way.
    """
    dtype = getattr(torch, compute_dtype_on(device, quantization))
    quantized = bitsandbytes_config(quantization, dtype)
    config = LlamaConfig.from_pretrained(base.path, local_files_only=True)
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    with quiet_loading():
        model = LlamaForCausalLM.from_pretrained(  # all but the layers
            base.path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            local_files_only=True,
            quantization_config=quantized,
        )
    model.config.num_hidden_layers = num_layers
    weights = _Weights(base.path)
    shards = []
    for index in range(num_layers):
        layer = _quantized_layer(model.config, index, weights, quantized, dtype, device)
        shards.append(_LayerShard(layer))
        model.model.layers.append(layer)
    _LayerGathering(shards)
    forbid_packed_cpu_kernel(model)  # it would repack weights that are gathered only briefly
    model.eval().requires_grad_(False)
    return model


def exclude_from_ddp(model: torch.nn.Module) -> None:
    """Exclude frozen parameters from DistributedDataParallel, which would make them equal on all ranks."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


class _LayerShard:
    """The 4-bit weights and scales of one decoder layer: this rank's shard, and all of them while gathered.

    Every tensor is a view of one storage, which is freed and refilled. Tensors that autograd saved in the forward pass
    (bitsandbytes saves the weight itself) therefore have their data again in the backward pass.
    """

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        self.layer = layer
        offsets, size = [], 0
        for tensor in (tensors := [*_four_bit_tensors(layer)]):
            offsets.append(size)
            size += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        world_size = dist.get_world_size()
        shard_size = math.ceil(size / world_size / _ALIGNMENT) * _ALIGNMENT
        self._full = torch.zeros(world_size * shard_size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, offset in zip(tensors, offsets, strict=True):
            view = self._full[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            tensor.data = view
        self._size = self._full.nbytes
        self._shard = self._full.chunk(world_size)[dist.get_rank()].clone()
        self._pending: dist.Work | None = None
        self._is_allocated = True
        self.free()

    def start_gather(self) -> None:
        """Start gathering the layer, unless it is gathered or being gathered."""
        if not self._is_allocated:
            self._full.untyped_storage().resize_(self._size)
            self._pending = _all_gather(self._full, self._shard, async_op=True)
            self._is_allocated = True

    def wait(self) -> None:
        """Make the device wait until the layer is gathered."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def free(self) -> None:
        """Free the memory of the gathered layer."""
        if self._is_allocated:
            self.wait()
            self._full.untyped_storage().resize_(0)
            self._is_allocated = False


class _LayerGathering:
    """Hooks that gather each layer before its forward or backward pass, and prefetch the next one meanwhile.

    At most these two layers are gathered at any time. The last layer is kept after a forward pass and the first after
    a backward pass, as the next pass starts there.
    """

    def __init__(self, shards: list[_LayerShard]) -> None:
        self._shards = shards
        for index, shard in enumerate(shards):
            shard.layer.register_forward_pre_hook(lambda module, args, index=index: self._on_forward(index))
            shard.layer.register_forward_hook(lambda module, args, out, index=index: self._on_output(index, out))

    def _on_forward(self, index: int) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # gradient checkpointing recomputes the layer
        self._gather(index, prefetch=index - 1 if in_backward else index + 1)

    def _on_output(self, index: int, hidden: torch.Tensor) -> None:
        if hidden.requires_grad:
            # Runs before this layer's backward pass starts, and after that of the layer above has ended.
            hidden.register_hook(lambda gradient: self._gather(index, prefetch=index - 1))

    def _gather(self, index: int, prefetch: int) -> None:
        for other, shard in enumerate(self._shards):
            if other not in (index, prefetch):
                shard.free()
        self._shards[index].start_gather()
        self._shards[index].wait()
        if 0 <= prefetch < len(self._shards):
            self._shards[prefetch].start_gather()


def _four_bit_tensors(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            yield module.weight
            yield state.absmax
            if state.nested:
                yield state.state2.absmax


def _quantized_layer(
    config: LlamaConfig,
    index: int,
    weights: "_Weights",
    quantized: BitsAndBytesConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> LlamaDecoderLayer:
    """Decoder layer `index`, quantized as transformers does when it loads a complete model."""
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, index)
    replace_with_bnb_linear(layer, quantization_config=quantized)
    for name, empty in [*layer.named_parameters()]:
        value = weights[f"model.layers.{index}.{name}"].to(device, dtype)
        if isinstance(empty, Params4bit):
            parameter = Params4bit(value, requires_grad=False, **empty.__dict__).to(device)
        else:
            parameter = torch.nn.Parameter(value, requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(module), leaf, parameter)
    return layer.eval()


class _Weights:
    """The tensors in a folder's safetensors files by name, read on access."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor
