"""The 4-bit base with LoRA adapters on it, ready to train (QLoRA, arXiv:2305.14314).

`training.trainer.train` and the registry's checks come here. Only attached adapters train; the NF4 base stays as it is,
and is the same base that is served. Knows nothing of data, Ray or the trainer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from training.base_models.nf4 import forbid_packed_cpu_kernel
from training.config.train_config import LoraSettings
from training.registry.adapter_files import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM


def start_adapter(
    model: "LlamaForCausalLM", lora: LoraSettings, weights_dir: Path | None = None, parent_dir: Path | None = None
) -> "PeftModel":
    """The base with the adapter that a run starts from: a new one, or the one in `parent_dir`, bit for bit.

    Args:
        lora: of the adapter; the shape is the parent's where there is one.
        weights_dir: see `attach_lora`.
        parent_dir: a registered adapter's files.
    """
    if parent_dir is None:
        return attach_lora(model, lora, weights_dir)
    peft_model = attach_lora(model, lora.model_copy(update={"init_lora_weights": "default"}))
    load_adapter(peft_model, parent_dir)
    return peft_model


def load_adapter(model: "PeftModel", directory: Path) -> None:
    """Give the attached adapter the weights in `directory`, which has one of the same shape, bit for bit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    loaded = set_peft_model_state_dict(model, load_file(directory / WEIGHTS_FILE))
    wrong = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if "lora_" in key)]
    assert not wrong, f"{wrong[0]}: whoever calls has checked the shape"


def attach_lora(model: "LlamaForCausalLM", lora: LoraSettings, weights_dir: Path | None = None) -> "PeftModel":
    """Add a trainable adapter named `default` to the NF4 base `model`, with its weights in float32.

    `lora_B` starts at zero, so the answers are the base's until the first step; with `init_lora_weights: loftq`
    A and B are the best rank-r part of what the 4-bit weights lose (arXiv:2310.08659; the base stays as it is).

    Args:
        weights_dir: the base's safetensors before quantization, which loftq compares with.
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
            init_lora_weights=True if lora.init_lora_weights != "gaussian" else "gaussian",
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    assert isinstance(peft_model, PeftModel)
    adapters_to_float32(peft_model)
    if lora.init_lora_weights == "loftq":
        assert weights_dir is not None, "the base before quantization is needed"
        start_from_quantization_error(peft_model, weights_dir)
    return peft_model


@contextmanager
def exact_adapters(model: "torch.nn.Module") -> Iterator[None]:
    """Give trainable weights back to `model` as they were before the block.

    TRL rounds adapters on a 4-bit base to bfloat16 when its trainer is built: a parent's adapter would be another.
    """
    exact = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name]


def adapters_to_float32(model: "torch.nn.Module") -> None:
    """Hold trainable weights in float32: small steps at a small learning rate vanish in bfloat16.

    TRL casts adapters on a 4-bit base to bfloat16 when its trainer is built, so this is called again after that.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def start_from_quantization_error(model: "PeftModel", weights_dir: Path) -> None:
    """Set A and B so that `scaling * B @ A` is the best rank-r approximation of `W - dequantized(W)` of every linear.

    LoftQ (arXiv:2310.08659) with one iteration, since the base is served as it is quantized; by a truncated singular
    value decomposition, whose error no other rank-r matrix undercuts (Eckart and Young).
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    linears = {
        name.partition("base_model.model.")[2] + ".weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    for shard in sorted(weights_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in linears.keys() & file.keys():
                module = linears[name]
                quantized, a, b = module.weight, module.lora_A["default"].weight, module.lora_B["default"].weight
                original = file.get_tensor(name).to(quantized.device, torch.float32)
                lost = original - dequantize_4bit(quantized.data, quantized.quant_state).float()
                u, s, v = torch.linalg.svd(lost, full_matrices=False)
                root = (s[: len(a)] / module.scaling["default"]).sqrt()
                a.data.copy_(root[:, None] * v[: len(a)])
                b.data.copy_(u[:, : len(a)] * root)
