"""Requests as other programs send them, a file of `cases/` for each kind: the status, and the place of an error.

An answer that had to follow a schema is parsed, and every chunk of a stream is.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import RunningServer

CASES = [
    pytest.param(case, id=f"{path.stem}: {case['name']}")
    for path in sorted(Path(__file__).with_name("cases").glob("*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))
]


@pytest.mark.promise("A1")
@pytest.mark.parametrize("case", CASES)
def test_a_request_gets_the_answer_that_its_sender_expects(server: RunningServer, case: dict[str, Any]) -> None:
    body = {"model": server.base_model, "max_tokens": 8, "temperature": 0, **case["body"]}
    response = httpx.post(server.url + case["route"], json=body, timeout=300)
    assert response.status_code == case["expect"], response.text
    if "param" in case:
        error = response.json()["error"]
        assert error["param"] == case["param"]
        assert len(error["message"].splitlines()) == 1
    elif body.get("stream"):
        *chunks, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]"
        assert all(json.loads(chunk)["object"] == "chat.completion.chunk" for chunk in chunks)
    else:
        choices = response.json()["choices"]
        assert len(choices) == body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
        if "response_format" in body and choices[0]["finish_reason"] == "stop":
            assert isinstance(json.loads(choices[0]["message"]["content"]), dict)
