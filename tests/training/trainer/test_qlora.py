"""The adapter on the 4-bit base: what trains, in which precision, and with which gradients."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from training.base_models.llama_shape import LLAMA_LINEARS
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import LoraSettings
from training.trainer.qlora import attach_lora

IDS = torch.tensor([[3, 50, 700, 12, 9, 4000, 31, 8]])


def adapted(base: BaseCheckpoint, settings: LoraSettings) -> PeftModel:
    torch.manual_seed(0)
    return attach_lora(load_quantized(base, Quantization()), settings, base.path)


def test_only_the_adapter_trains_in_float32_on_every_linear_layer_but_lm_head(tiny_base: BaseCheckpoint) -> None:
    model = adapted(tiny_base, LoraSettings(r=4))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert len(trainable) == 2 * 2 * len(LLAMA_LINEARS)  # layers, A and B
    assert not any("lm_head" in name for name in trainable)


def test_target_modules_can_be_chosen(tiny_base: BaseCheckpoint) -> None:
    model = adapted(tiny_base, LoraSettings(r=4, target_modules=["v_proj", "q_proj"]))
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}


def test_fresh_adapter_answers_like_the_base(tiny_base: BaseCheckpoint) -> None:
    model = adapted(tiny_base, LoraSettings(r=4)).eval()
    with torch.no_grad():
        adapter = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    assert torch.equal(adapter, base)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_gradients_are_equal_with_and_without_an_evaluation_before(
    tiny_base: BaseCheckpoint, compute_dtype: str
) -> None:
    def gradients(evaluate_first: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        quantization = Quantization.model_validate({"compute_dtype": compute_dtype})
        model = attach_lora(load_quantized(tiny_base, quantization), LoraSettings(r=4, lora_dropout=0.0))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A's gradient
                torch.nn.init.normal_(parameter, std=0.1)
        if evaluate_first:
            model.eval()
            with torch.no_grad():
                model(IDS)
                model(IDS[:, :1])
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    without, with_evaluation = gradients(False), gradients(True)
    assert len(without) == len(with_evaluation) == 2 * 2 * len(LLAMA_LINEARS)
    assert all(grad.abs().max() > 0 for grad in without)
    assert all(torch.equal(a, b) for a, b in zip(without, with_evaluation, strict=True))


def test_saved_adapter_is_float32_safetensors(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapted(tiny_base, LoraSettings(r=4)).save_pretrained(str(tmp_path), save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_loftq_starts_from_the_best_rank_r_part_of_what_4_bit_loses(tiny_base: BaseCheckpoint) -> None:
    model = adapted(tiny_base, LoraSettings(r=4, lora_alpha=16, init_lora_weights="loftq"))
    weights = load_file(next(tiny_base.path.glob("*.safetensors")))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        original = weights[name.partition("base_model.model.")[2] + ".weight"].float()
        quantized = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        lost = original - quantized
        learned = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left_at_best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()  # Eckart and Young
        assert (lost - learned).norm().item() == pytest.approx(left_at_best.item(), rel=1e-3)
        assert left_at_best < lost.norm()
