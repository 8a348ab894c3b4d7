"""A server for clients that have an environment of their own (`make test-clients`); it runs in the main one.

Its adapter has random weights: these tests check the format and the numbers of an answer, not its meaning.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunningServer, serve_config, start_server, stop_server
from training.base_models.resolve import BaseCheckpoint
from training.registry.adapter_files import LoraParams, lora_shapes
from training.registry.publish import import_adapter
from training.registry.registry import AdapterRegistry

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm and dspy otherwise ask GitHub for prices

MAIN_PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"


def random_adapter(base: BaseCheckpoint, folder: Path) -> Path:
    """A complete LoRA of r 4 on the attention of `base`, as PEFT would write it."""
    import torch
    from safetensors.torch import save_file

    lora = LoraParams(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in lora_shapes(base, lora).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name}
    (folder / "adapter_config.json").write_text(json.dumps(config | lora.model_dump()))
    return folder


@pytest.fixture(scope="session")
def server(embedded_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The embedded model and the adapter, served as `corral serve` does."""
    folder = random_adapter(embedded_base, tmp_path_factory.mktemp("adapter"))
    import_adapter(AdapterRegistry(), folder, "ranch-hand", embedded_base, chat_format="chatml", force=True)
    process, running = start_server(serve_config(), tmp_path_factory.mktemp("server"), str(MAIN_PYTHON))
    yield running
    assert stop_server(process) == 0, running.log.read_text()[-4000:]
