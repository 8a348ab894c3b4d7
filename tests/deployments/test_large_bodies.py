"""Bodies of up to 2 MB that are wrong (B1, B2): refused at once with the field's name, whatever is inside."""

import json
import time
from typing import Any

import httpx
import pytest

from tests.conftest import InProcessApi

USER = {"role": "user", "content": "hi"}
IMAGES = {"role": "user", "content": [{"type": "image_url"}] * 60_000}
MANY_FIELDS = {f"k{i}": i for i in range(100_000)}
LARGE: list[tuple[str, Any, int, str | None]] = [
    ("nesting of lists", "[" * 10_000, 400, None),
    ("nesting of objects", '{"a":' * 10_000, 400, None),
    ("a message nested 10,000 deep", '{"messages": ' + "[" * 10_000, 400, None),
    ("an endless number", '{"n": ' + "9" * 100_000 + "}", 400, None),
    ("over 2 MB", {"user": "x" * 2_200_000}, 413, None),
    ("many numbers for messages", {"messages": [1] * 600_000}, 400, "messages.0"),
    ("many broken messages", {"messages": [{"role": 1}] * 100_000}, 400, "messages.0.role"),
    ("many image parts", {"messages": [IMAGES]}, 400, "messages.0.content.0.type"),
    ("many numbers for stop", {"stop": [1] * 600_000}, 400, "stop.0"),
    ("many stop strings", {"stop": ["x"] * 300_000}, 400, "stop"),
    ("many unknown fields", MANY_FIELDS, 400, "k0"),
    ("many unknown fields in a message", {"messages": [USER | MANY_FIELDS]}, 400, "messages.0.k0"),
    ("many biases", {"logit_bias": {str(i): 1 for i in range(100_000)}}, 400, "logit_bias"),
    ("a long role", {"messages": [{"role": "x" * 1_900_000, "content": "hi"}]}, 400, "messages.0"),
    ("a long model id", {"model": "x" * 1_900_000}, 404, "model"),
]  # fmt: skip


@pytest.mark.promise("B1")
@pytest.mark.parametrize(("name", "change", "status", "param"), LARGE, ids=[row[0] for row in LARGE])
def test_a_large_body_is_refused_in_200_ms_naming_the_field(
    tiny_api: InProcessApi, name: str, change: Any, status: int, param: str | None
) -> None:
    good = {"model": tiny_api.base.name, "messages": [USER], "max_tokens": 1}
    content = change if isinstance(change, str) else json.dumps(good | change, separators=(",", ":"))
    seconds = []
    with httpx.Client(base_url=tiny_api.url, headers={"content-type": "application/json"}) as client:
        client.get("/healthz")
        for _ in range(5):
            started = time.process_time()  # client and server are this process
            response = client.post("/v1/chat/completions", content=content)
            seconds.append(time.process_time() - started)
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert error["param"] == param, error
    assert len(error["message"]) < 500
    print(f"\n{name}: {min(seconds) * 1000:.0f} ms")
    assert min(seconds) < 0.2
