"""Clients that run as programs of their own: those from Node, and those of Python that want older packages than Corral.

Each prints an answer for every scenario (`node/`, `apart/`). At temperature 0 a text is what a plain request gets.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningServer
from tests.third_party.plain import QUESTION, SECOND_QUESTION, plain

HERE = Path(__file__).parent
APART_PYTHON = HERE.parents[1] / ".venv-clients-apart" / "bin" / "python"
NODE = ["openai_chat", "openai_responses", "ai openai", "ai openai.chat", "ai openai-compatible"]
NODE += ["ai openai-compatible with schemas"]
PROGRAMS = ["instructor_client", "llama_index_client", *NODE]
HAVE_MORE = {
    "streamed_tool": [name for name in PROGRAMS if name != "instructor_client"],
    "streamed_structured": ["instructor_client", "llama_index_client"],
    "schema_structured": ["llama_index_client"],
}

Answers = dict[str, dict[str, Any]]


def command(program: str) -> list[str]:
    """What runs it, without the address, the model and the way to use the client."""
    if program not in NODE:
        return [str(APART_PYTHON), str(HERE / "apart" / f"{program}.py")]
    node = shutil.which("node")
    if node is None or not (HERE / "node" / "node_modules").exists():
        pytest.skip("clients from Node need node and npm")
    return [node, str(HERE / "node" / f"{program.split()[0]}.mjs")]


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers(program: str, server: RunningServer) -> Answers:
    """What a program printed, run once."""
    way = [program.partition(" ")[2]] if " " in program else []
    arguments = [*command(program), f"{server.url}/v1", server.base_model, *way]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    printed: Answers = json.loads(done.stdout.splitlines()[-1])  # before it may be a client's warnings
    return printed


def answer(answers: Answers, scenario: str) -> dict[str, Any]:
    assert "error" not in answers[scenario], answers[scenario]["error"]
    return answers[scenario]


@pytest.mark.promise("F7")
def test_chat_and_stream_are_the_plain_answer(server: RunningServer, answers: Answers) -> None:
    expected = plain(server, QUESTION)
    assert answer(answers, "chat") == expected
    pieces = answer(answers, "stream")["pieces"]
    assert len(pieces) > 1
    assert "".join(pieces) == expected["text"]


@pytest.mark.promise("F7")
def test_a_second_turn_continues_the_first(server: RunningServer, answers: Answers) -> None:
    first = plain(server, QUESTION)["text"]
    assert answer(answers, "second_turn") == plain(server, QUESTION, first, SECOND_QUESTION)


@pytest.mark.promise("F7")
def test_structured_output_by_the_clients_default(program: str, answers: Answers) -> None:
    value = answer(answers, "structured")["value"]
    if program == "ai openai-compatible":  # by default it asks for any object
        assert isinstance(value, dict)
    else:
        check_city(value)


def check_city(value: Any) -> None:
    assert value.keys() == {"name", "is_capital"}
    assert value["name"] in ("Paris", "Rome")
    assert isinstance(value["is_capital"], bool)


@pytest.mark.promise("F7")
@pytest.mark.parametrize("scenario", ["streamed_structured", "schema_structured"])
def test_structured_output_by_a_clients_other_ways(program: str, answers: Answers, scenario: str) -> None:
    if program not in HAVE_MORE[scenario]:
        assert scenario not in answers
    else:
        check_city(answer(answers, scenario)["value"])


@pytest.mark.promise("F7")
def test_a_tool_is_called_and_its_result_is_in_the_next_prompt(answers: Answers) -> None:
    called = answer(answers, "tool")
    assert called["name"] == "weather"
    assert called["arguments"] in ({"city": "Paris"}, {"city": "Rome"})
    assert called["finish_reason"] in ("tool_calls", "tool-calls", "completed", "stop")
    before, after = called["prompt_tokens"]
    assert after > before
    assert called["text"]


@pytest.mark.promise("F7")
def test_a_streamed_call_is_the_whole_call(program: str, answers: Answers) -> None:
    if program not in HAVE_MORE["streamed_tool"]:
        assert "streamed_tool" not in answers
    else:
        streamed = answer(answers, "streamed_tool")
        assert streamed.items() <= answer(answers, "tool").items()
