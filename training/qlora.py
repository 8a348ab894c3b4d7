"""The 4-bit base with LoRA adapters on it, ready to train (QLoRA, arXiv:2305.14314).

`training.sft` and the registry's checks come here. Only attached adapters train; the NF4 base stays as it is,
and is the same base that is served. Knows nothing of data, Ray or the trainer.
"""

from typing import TYPE_CHECKING

from training.base_models import forbid_packed_cpu_kernel
from training.config import LoraSettings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM


def attach_lora(model: "LlamaForCausalLM", lora: LoraSettings) -> "PeftModel":
    """Add a trainable adapter named `default` to the NF4 base `model`, with its weights in float32.

    `lora_B` starts at zero, so the answers are the base's until the first step.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    forbid_packed_cpu_kernel(model)  # with it, gradients are lost after any evaluation
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=list(lora.targets),
            use_rslora=lora.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    assert isinstance(peft_model, PeftModel)
    adapters_to_float32(peft_model)
    return peft_model


def adapters_to_float32(model: "torch.nn.Module") -> None:
    """Hold trainable weights in float32: small steps at a small learning rate vanish in bfloat16.

    TRL casts adapters on a 4-bit base to bfloat16 when its trainer is built, so this is called again after that.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
