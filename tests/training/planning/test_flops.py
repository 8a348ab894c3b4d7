"""The time estimate against operations that torch counts in real steps."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from training.base_models.llama_shape import LlamaDims
from training.config.train_config import LoraSettings
from training.planning.flops import GPU_FLOPS, UTILISATION, estimate_time, training_flops

SIZES = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
LENGTH = 64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_real_step(checkpointing: bool) -> None:
    """Of a frozen base with adapters; torch counts attention as if it were not causal."""
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    lora = LoraSettings(r=8, lora_dropout=0.0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=lora.targets, task_type="CAUSAL_LM")).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids).loss.backward()

    dims = LlamaDims.of(config.to_dict())
    estimated = training_flops(dims, lora, 2 * LENGTH, LENGTH, labelled_share=1.0, checkpointing=checkpointing)
    attention = 2 * LENGTH * 2 * dims.num_layers * dims.attention * LENGTH * (4 if checkpointing else 3)
    assert estimated + attention == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_time_is_operations_over_what_is_assumed_of_the_gpus() -> None:
    estimate = estimate_time(2 * GPU_FLOPS * UTILISATION * 7200, 2)
    assert estimate.seconds == pytest.approx(7200)
    assert str(estimate).startswith("about 2.0 hours on 2 x A100 (estimated: ")
    assert "about 20 minutes on" in str(replace(estimate, seconds=1200.0))


def test_guanaco_65b_takes_about_the_day_that_the_qlora_paper_gives_it() -> None:
    """On one GPU of 48 GB, with 155 TFLOP/s of dense bfloat16 (NVIDIA A6000 data sheet): half of an A100's."""
    dims = LlamaDims.of({
        "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
        "vocab_size": 32000,
    })  # fmt: skip
    flops = training_flops(dims, LoraSettings(r=64), 1875 * 16 * 512, 512, labelled_share=1.0, checkpointing=True)
    hours = estimate_time(flops, 1).seconds / 3600 * GPU_FLOPS / 155e12
    assert 12 < hours < 48
