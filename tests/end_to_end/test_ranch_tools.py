"""The recipe with tools (F2): after training, the adapter calls the right tool where the base does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.api import CorralClient
from tests.conftest import RunningServer

pytestmark = pytest.mark.slow

ROWS = [json.loads(line) for line in Path("configs/datasets/ranch_hand_tools.jsonl").read_text().splitlines()]
TOOLS: list[dict[str, Any]] = [*{tool["function"]["name"]: tool for row in ROWS for tool in row["tools"]}.values()]
# Questions that no row has, and the calls that answer them.
HELD_OUT: list[tuple[str, str, dict[str, Any]]] = [
    ("Will there be rain on Sunday?", "get_weather", {"day": "sunday"}),
    ("Do I need an umbrella today?", "get_weather", {"day": "today"}),
    ("How warm will it be tomorrow?", "get_weather", {"day": "tomorrow"}),
    ("How many goats live on the ranch?", "count_animals", {"kind": "goats"}),
    ("Please count our hens.", "count_animals", {"kind": "hens"}),
    ("Number of sheep?", "count_animals", {"kind": "sheep"}),
    ("Open up the river gate, please.", "set_gate", {"gate": "river", "open": True}),
    ("Close the south gate now.", "set_gate", {"gate": "south", "open": False}),
    ("Please lock the north gate.", "set_gate", {"gate": "north", "open": False}),
    ("Please order 9 sacks of corn.", "order_feed", {"feed": "corn", "sacks": 9}),
    ("We are out of hay, buy 40 sacks.", "order_feed", {"feed": "hay", "sacks": 40}),
    ("Order 6 bags of oats.", "order_feed", {"feed": "oats", "sacks": 6}),
]


def train() -> str:
    command = [sys.executable, "-m", "clients.cli", "train", "configs/train/ranch_tools.yaml"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return "smollm2-135m:ranch-tools"


def calls_of(server: RunningServer, model: str, question: str) -> list[dict[str, Any]]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 80,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    if choice["finish_reason"] != "tool_calls":  # text, or cut off
        return []
    calls: list[dict[str, Any]] = choice["message"]["tool_calls"]
    return [{"name": call["function"]["name"], **json.loads(call["function"]["arguments"])} for call in calls]


def num_right(server: RunningServer, model: str) -> int:
    return sum(
        calls_of(server, model, question) == [{"name": name, **arguments}] for question, name, arguments in HELD_OUT
    )


@pytest.mark.promise("F2")
def test_the_adapter_calls_the_right_tool_where_the_base_does_not(server: RunningServer, tmp_path: Path) -> None:
    assert not {question for question, _, _ in HELD_OUT} & {row["messages"][0]["content"] for row in ROWS}
    adapter = train()
    base_score, adapter_score = num_right(server, server.base_model), num_right(server, adapter)
    print(f"right calls of {len(HELD_OUT)}: base {base_score}, adapter {adapter_score}")
    assert adapter_score >= 8
    assert base_score <= 2
    with CorralClient(server.url) as client:  # a greeting needs no tool, and a result becomes a sentence
        greeting = [*client.stream_deltas("Good morning!", model=adapter, tools=TOOLS, temperature=0, max_tokens=40)]
        assert not any(delta.tool_calls for delta in greeting)
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    question = ["How many goats live on the ranch?", "--tools", str(tools)]
    command = [sys.executable, "-m", "clients.cli", "chat", *question, "--model", adapter, "--url", server.url]
    shown = subprocess.run([*command, "--temperature", "0"], capture_output=True, text=True, timeout=300)
    assert shown.stdout == '→ count_animals {"kind": "goats"}\n', shown.stderr
