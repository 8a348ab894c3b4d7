"""Loads a base model's weights in NF4; training and serving share this code, so their weights are bit-identical.

torch, transformers and bitsandbytes are imported only when weights are loaded.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from training.base_models.resolve import BaseCheckpoint

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM


ComputeDtype = Literal["bfloat16", "float16", "float32"]  # torch's names


class Quantization(BaseModel):
    """How the base's linear layers are stored: NF4, the format of the QLoRA paper (arXiv:2305.14314).

    The 4-bit codes are the same for every compute dtype. `auto` is resolved by `compute_dtype_on`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_type: Literal["nf4"] = "nf4"
    double_quant: bool = True
    compute_dtype: ComputeDtype | Literal["auto"] = "auto"


def load_quantized(
    base: BaseCheckpoint, quantization: Quantization, device: "torch.device | str" = "cpu"
) -> "LlamaForCausalLM":
    """Load the base with its linear layers in 4 bits (all but lm_head) and everything else in the compute dtype.

    Returns the transformers model in eval mode with `requires_grad` off everywhere.
    """
    import torch
    from transformers import LlamaForCausalLM

    compute_dtype = compute_dtype_on(device, quantization)
    dtype = getattr(torch, compute_dtype)
    with quiet_loading():
        model = LlamaForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            device_map={"": torch.device(device)},
            attn_implementation="sdpa",
            local_files_only=True,
            quantization_config=bitsandbytes_config(quantization, dtype),
        )
    if compute_dtype == "float32":
        forbid_packed_cpu_kernel(model)
    model.eval().requires_grad_(False)
    return model


def bitsandbytes_config(quantization: Quantization, compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """The `quantization_config` of transformers' `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def compute_dtype_on(device: "torch.device | str", quantization: Quantization) -> ComputeDtype:
    """The dtype to compute in: the configured one, or for `auto` one that is fast on the device.

    That is bfloat16 where the device has instructions for it, otherwise float16 on a GPU and float32 on a CPU, where
    bfloat16 would be ten times slower.
    """
    import torch

    if quantization.compute_dtype != "auto":
        return quantization.compute_dtype
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"


def forbid_packed_cpu_kernel(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its avx512_bf16 kernel at the first evaluation.

    The kernel rounds activations to bf16 even if the compute dtype is float32, and after the repacking a training
    forward pass has no gradient through the base. It must therefore be off for float32 and for training.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' progress bars and all warnings, such as those about deprecated names."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            enable_progress_bar()
