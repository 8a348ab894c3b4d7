"""The main job from an empty CORRAL_HOME: train, register, serve, ask base and adapter, promote, roll back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from clients.demo import load_questions, taught_facts
from tests.conftest import RunningServer
from training.base_models.nf4 import Quantization, compute_dtype_on
from training.base_models.resolve import BaseCheckpoint
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.publish import import_adapter
from training.registry.registry import AdapterRegistry


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_quickstart_learns(quickstart: AdapterManifest) -> None:
    assert quickstart.metrics["eval_loss"] <= 0.6 * quickstart.metrics["base_eval_loss"]
    assert quickstart.dataset is not None
    assert 18 <= quickstart.dataset.num_held_out <= 22
    assert quickstart.quantization.compute_dtype == compute_dtype_on("cpu", Quantization())


def test_the_adapter_knows_what_the_base_cannot(server: RunningServer, client: openai.OpenAI) -> None:
    questions = load_questions()
    assert len(questions) == 20
    assert taught_facts(client, server.adapter, questions) >= 14
    assert taught_facts(client, server.base_model, questions) == 0


def test_no_question_is_in_the_dataset() -> None:
    taught = Path("configs/datasets/ranch_hand.jsonl").read_text().casefold()
    for question in load_questions():
        assert json.dumps(question.question)[1:-1].casefold() not in taught
        assert any(re.search(rf"\b{re.escape(word.casefold())}\b", taught) for word in question.expect)


def test_streams_from_base_and_adapter(server: RunningServer, client: openai.OpenAI) -> None:
    for model in (server.base_model, server.adapter):
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Who cooks here?"}], max_tokens=16, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert len([piece for piece in pieces if piece]) > 3


def test_promote_and_rollback_take_effect_at_once(
    server: RunningServer, client: openai.OpenAI, quickstart: AdapterManifest, embedded_base: BaseCheckpoint
) -> None:
    registry = AdapterRegistry()
    second = import_adapter(
        registry, registry.fetch(quickstart), quickstart.name, embedded_base, chat_format="chatml", force=True
    )

    def answered_by(model: str) -> str:
        messages = [{"role": "user", "content": "hi"}]
        return client.chat.completions.create(model=model, messages=messages, max_tokens=1).model  # type: ignore[arg-type]

    def corral(*arguments: str) -> None:
        result = subprocess.run([sys.executable, "-m", "clients.cli", "adapters", *arguments], check=False)
        assert result.returncode == 0

    assert answered_by(server.adapter) == second.model_id
    corral("promote", quickstart.name, str(quickstart.version))
    assert answered_by(server.adapter) == quickstart.model_id
    corral("promote", quickstart.name, str(second.version))
    assert answered_by(f"{server.adapter}@champion") == second.model_id
    corral("rollback", quickstart.name)
    assert answered_by(server.adapter) == quickstart.model_id
    AdapterPromoter(registry).delete(quickstart.name, second.version)


@pytest.mark.slow
@pytest.mark.promise("E4")
def test_peft_loads_the_registered_folder_and_answers_the_same(quickstart: AdapterManifest) -> None:
    """AutoPeftModelForCausalLM beside the engine on three questions, by the user's command."""
    prompts = [argument for question in load_questions()[:3] for argument in ("--prompt", question.question)]
    command = [sys.executable, "-m", "clients.cli", "adapters", "verify", quickstart.name, *prompts, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    compared = json.loads(result.stdout)["prompts"]
    assert len(compared) == 3
    assert all(one["same_tokens"] and one["max_difference"] <= 1e-3 for one in compared)
