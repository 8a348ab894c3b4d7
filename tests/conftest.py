"""Fixtures that several test modules share."""

import shutil
from pathlib import Path

import pytest

from training.base_models import EMBEDDED_MODEL, BaseModel, resolve_base_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random Llama of 2 layers with the embedded model's tokenizer: for logic, not for answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path: Path = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that two prompts get different answers
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    embedded = resolve_base_model(EMBEDDED_MODEL).path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, path / name)
    return resolve_base_model(str(path))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT's `save_pretrained` writes for LoRA r 4 on all linear layers of `tiny_base`, B not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("adapters") / "tiny"
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(path)
    return path
