"""FSDP-QLoRA: the 4-bit base spread over workers, each holding a part of every layer, whole layers only while they run.

`training.trainer.train` loads the base here when `fsdp` is set. Adapters, embeddings, norms and lm_head are on every
worker, as without. Every forward pass takes all ranks, as many times on each; backward passes may follow. Knows nothing
of data, adapters or the trainer.

Not torch's FSDP, which shards parameters of floating-point types: it would take the codes for bfloat16 numbers
(`bnb_4bit_quant_storage`), leave their scales whole on every worker, and refuse float32 adapters beside them. Bytes
that nobody interprets are gathered bit for bit as they were quantized.
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

# Its name up to torch 2.12 is deprecated since.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_ALIGNMENT = 16  # bytes: any dtype, and any vector load of a CUDA kernel, may begin there


def load_sharded(base: BaseCheckpoint, quantization: Quantization, device: torch.device) -> LlamaForCausalLM:
    """`training.base_models.nf4.load_quantized`, its decoder layers shared by all ranks of torch.distributed.

    Layer after layer is read, quantized on `device` and cut to this rank's part: a device never holds more than two.
    The same weights to the bit, and the same model to whoever calls it.
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
    parts = []
    for place in range(num_layers):
        layer = _quantized_layer(model.config, place, weights, quantized, dtype, device)
        parts.append(_LayerPart(layer))
        model.model.layers.append(layer)
    _GatheredInTurn(parts)
    forbid_packed_cpu_kernel(model)  # it would repack weights that are there for a moment only
    model.eval().requires_grad_(False)
    return model


def exclude_from_ddp(model: torch.nn.Module) -> None:
    """Keep DistributedDataParallel, which makes all ranks' parameters equal, away from those that do not train."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


class _LayerPart:
    """The 4-bit weights and scales of one decoder layer: this rank's part of them, or for a while all of them.

    Every tensor of them is a view of one storage, which is emptied and filled. What autograd keeps of a forward pass
    (bitsandbytes keeps the weight itself) is therefore there again for the backward pass.
    """

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        self.layer = layer
        places, size = [], 0
        for tensor in (tensors := [*_four_bit_tensors(layer)]):
            places.append(size)
            size += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        world_size = dist.get_world_size()
        part_size = math.ceil(size / world_size / _ALIGNMENT) * _ALIGNMENT
        self._whole = torch.zeros(world_size * part_size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, place in zip(tensors, places, strict=True):
            view = self._whole[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            tensor.data = view
        self._size = self._whole.nbytes
        self._part = self._whole.chunk(world_size)[dist.get_rank()].clone()
        self._arriving: dist.Work | None = None
        self._here = True
        self.drop()

    def begin(self) -> None:
        """Start to gather the layer, if it is not here or on its way."""
        if not self._here:
            self._whole.untyped_storage().resize_(self._size)
            self._arriving = _all_gather(self._whole, self._part, async_op=True)
            self._here = True

    def wait(self) -> None:
        """Let the device go on only when the layer is here."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def drop(self) -> None:
        """Give the memory of the whole layer back."""
        if self._here:
            self.wait()
            self._whole.untyped_storage().resize_(0)
            self._here = False


class _GatheredInTurn:
    """Has a layer gathered when its forward or backward pass begins, and the one that comes next on its way meanwhile.

    These two are all that is whole at any time. The last layer stays after a forward pass and the first after a
    backward pass, which is where the next pass begins.
    """

    def __init__(self, parts: list[_LayerPart]) -> None:
        self._parts = parts
        for place, part in enumerate(parts):
            part.layer.register_forward_pre_hook(lambda module, args, place=place: self._on_forward(place))
            part.layer.register_forward_hook(lambda module, args, out, place=place: self._on_output(place, out))

    def _on_forward(self, place: int) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # gradient checkpointing computes the layer once more
        self._use(place, then=place - 1 if in_backward else place + 1)

    def _on_output(self, place: int, hidden: torch.Tensor) -> None:
        if hidden.requires_grad:
            # Runs before anything of the layer's backward pass, and after everything of the next layer's.
            hidden.register_hook(lambda gradient: self._use(place, then=place - 1))

    def _use(self, place: int, then: int) -> None:
        for other, part in enumerate(self._parts):
            if other not in (place, then):
                part.drop()
        self._parts[place].begin()
        self._parts[place].wait()
        if 0 <= then < len(self._parts):
            self._parts[then].begin()


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
    place: int,
    weights: "_Weights",
    quantized: BitsAndBytesConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> LlamaDecoderLayer:
    """Decoder layer number `place`, quantized as transformers does when it loads a whole model."""
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, place)
    replace_with_bnb_linear(layer, quantization_config=quantized)
    for name, empty in [*layer.named_parameters()]:
        value = weights[f"model.layers.{place}.{name}"].to(device, dtype)
        if isinstance(empty, Params4bit):
            parameter = Params4bit(value, requires_grad=False, **empty.__dict__).to(device)
        else:
            parameter = torch.nn.Parameter(value, requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(module), leaf, parameter)
    return layer.eval()


class _Weights:
    """The tensors of a folder's safetensors by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor
