"""A base model's weights in NF4, as training and serving both load them: the same bits.

torch, transformers and bitsandbytes are imported only where weights are touched.
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
    """How the base's linear layers are held: NF4, the format of the QLoRA paper (arXiv:2305.14314).

    The 4-bit codes are the same for every compute dtype. `auto` is resolved by `compute_dtype_on`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_type: Literal["nf4"] = "nf4"
    double_quant: bool = True
    compute_dtype: ComputeDtype | Literal["auto"] = "auto"


def load_quantized(
    base: BaseCheckpoint, quantization: Quantization, device: "torch.device | str" = "cpu"
) -> "LlamaForCausalLM":
    """Load the base with its linear layers in 4 bit (all but lm_head), everything else in the compute dtype.

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
    """What transformers' `from_pretrained` takes for this quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def compute_dtype_on(device: "torch.device | str", quantization: Quantization) -> ComputeDtype:
    """The dtype to compute in: what is asked for, or for `auto` what the device multiplies fast.

    That is bfloat16 where there are instructions for it; without them float16 on a GPU and float32 on a CPU, where
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

    The kernel rounds activations to bf16 even where the compute dtype is float32, and a training forward after
    the repacking loses its gradient through the base: float32 and training both go without it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers, and no warnings of names that libraries are about to change."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            enable_progress_bar()
