"""What a request costs in the ingress, and that none holds up its event loop: the figures of the README (pytest -s).

The ingress is the real one on the embedded model's tokenizer; the model behind it answers at once.
"""

import asyncio
import gc
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from deployments.config import EngineArgs, ServeArgs
from deployments.engine.request import Delta
from deployments.replica.request import GenerationRequest
from tests.deployments.in_process import running_api
from training.base_models.resolve import BaseCheckpoint


class AnswersAtOnce:
    """One token, which ends the answer."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        yield [Delta([28120], "length", 0)]

    async def ready(self) -> None:
        """Always."""


def on_api(base: BaseCheckpoint, use: Callable[[FastAPI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        args = ServeArgs(base_model=str(base.path), engine=EngineArgs(max_model_len=4096))
        async with running_api(args, AnswersAtOnce()) as api:
            return await use(api)

    return asyncio.run(run())


async def ask(api: FastAPI, route: str, content: bytes) -> dict[str, Any]:
    """The answer's body, straight from the application: a client would use the same event loop."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": f"/v1/{route}",
        "raw_path": f"/v1/{route}".encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    answer = b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal answer
        answer += message.get("body", b"")

    await api(scope, receive, send)
    return dict(json.loads(answer))


def test_a_request_costs_the_ingress_less_than_3_ms(tiny_base: BaseCheckpoint) -> None:
    """Authentication, validation, rendering and formatting of a short dialog, median of 300."""
    body = {
        "model": tiny_base.name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0.7,
        "max_tokens": 64,
    }
    content = json.dumps(body).encode()

    async def cost_ms(api: FastAPI) -> float:
        started = time.process_time()
        answer = await ask(api, "chat/completions", content)
        assert answer["usage"]["completion_tokens"] == 1
        return (time.process_time() - started) * 1000

    async def measure(api: FastAPI) -> list[float]:
        return [await cost_ms(api) for _ in range(320)][20:]

    costs = on_api(tiny_base, measure)
    print(f"\none request costs the ingress {statistics.median(costs):.2f} ms (least {min(costs):.2f})")
    assert statistics.quantiles(costs, n=4)[0] < 3  # the faster quarter: without other load on the machine


LONG: list[tuple[str, str, dict[str, Any]]] = [
    ("1 MB of words", "chat/completions", {"messages": [{"role": "user", "content": "hello " * 170_000}]}),
    ("a 1 MB word", "chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
    ("1 MB to continue", "completions", {"prompt": "hello " * 170_000}),
]


async def longest_block_ms(api: FastAPI, route: str, content: bytes) -> float:
    """The longest that the loop's thread computed before a task that wakes every millisecond ran."""
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            late = max(late, time.thread_time() - before)

    await asyncio.sleep(0)
    ticking = asyncio.create_task(tick())
    answer = await ask(api, route, content)
    ticking.cancel()
    assert answer["error"]["code"] == "context_length_exceeded"
    return late * 1000


@pytest.mark.parametrize(("name", "route", "fields"), LONG, ids=[row[0] for row in LONG])
def test_a_long_prompt_does_not_hold_up_the_event_loop(
    tiny_base: BaseCheckpoint, name: str, route: str, fields: dict[str, Any]
) -> None:
    async def measure(api: FastAPI) -> list[float]:
        content = json.dumps({"model": tiny_base.name, **fields}).encode()
        gc.collect()
        return [await longest_block_ms(api, route, content) for _ in range(7)]

    blocks = on_api(tiny_base, measure)
    print(f"\n{name}: the event loop was held up for {min(blocks):.1f} ms (median {statistics.median(blocks):.1f})")
    assert min(blocks) < 10  # 5 on a quiet machine; encoding it takes half a second or more
