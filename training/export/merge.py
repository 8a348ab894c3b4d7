"""The base's weights with an adapter folded in, one tensor at a time: W + scaling * B @ A.

`training.export.export` and `training.export.gguf` write them. Never more than one tensor is computed at once, so a
model larger than memory can be merged.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from training.base_models.llama_shape import LLAMA_LINEARS
from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.registry.adapter_files import WEIGHTS_FILE, LoraParams

MergeBase = Literal["nf4", "original"]


@dataclass(frozen=True)
class MergedWeights:
    """A base and an adapter as one model.

    Attributes:
        adapter_dir: a registered folder that was checked.
        onto: what the update is added to: `nf4`, the base's linear layers quantized and dequantized again, which are
            the weights that the adapter was trained on; or `original`, the base's own 16-bit weights.
    """

    base: BaseCheckpoint
    adapter_dir: Path
    lora: LoraParams
    quantization: Quantization
    onto: MergeBase

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """The base's files, and the names of the tensors in each."""
        index = self.base.path / "model.safetensors.index.json"
        if not index.is_file():
            files = [path.name for path in sorted(self.base.path.glob("*.safetensors"))]
        else:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        names = {}
        for file in files:
            with safe_open(self.base.path / file, framework="pt") as shard:
                names[file] = sorted(shard.keys())
        return names

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the merged tensors are in: the base's own 16-bit dtype, or bfloat16 where it has none."""
        config = self.base.llama_config()
        named = str(config.get("dtype") or config.get("torch_dtype"))
        return torch.float16 if named == "float16" else torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        with safe_open(self.base.path / self._file_of[name], framework="pt") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The merged tensor, in `dtype`."""
        with safe_open(self.base.path / self._file_of[name], framework="pt") as shard:
            weight: torch.Tensor = shard.get_tensor(name)
        module = name.removesuffix(".weight")
        if name == module or module.rpartition(".")[2] not in LLAMA_LINEARS:
            return weight.to(self.dtype).contiguous()
        weight = nf4_round_trip(weight, self.quantization) if self.onto == "nf4" else weight.float()
        a = self._adapter.get(f"base_model.model.{module}.lora_A.weight")
        if a is not None:
            b = self._adapter[f"base_model.model.{module}.lora_B.weight"]
            weight.addmm_(b.float(), a.float(), alpha=self.lora.scaling)
        return weight.to(self.dtype)

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return {name: file for file, names in self.shards.items() for name in names}

    @cached_property
    def _adapter(self) -> dict[str, Any]:
        tensors: dict[str, Any] = load_file(self.adapter_dir / WEIGHTS_FILE)
        return tensors


def nf4_round_trip(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """`weight` [out, in] as the 4-bit base has it: quantized as it is loaded for serving, and back; float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    compute_dtype = "bfloat16" if quantization.compute_dtype == "auto" else quantization.compute_dtype
    loaded = weight.to(getattr(torch, compute_dtype)).float()
    packed, state = quantize_4bit(
        loaded, compress_statistics=quantization.double_quant, quant_type=quantization.quant_type
    )
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored
