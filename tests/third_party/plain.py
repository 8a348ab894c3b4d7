"""The answer that a request without any client gets: at temperature 0, every client must get the same."""

from typing import Any

import httpx

from tests.conftest import RunningServer

QUESTION, SECOND_QUESTION = "What is the capital of France?", "And of Italy?"
TOOL_QUESTION = "How warm is it in Paris?"


def plain(
    server: RunningServer, *texts: str, model: str | None = None, system: str = "", max_tokens: int = 16
) -> dict[str, Any]:
    """The text after a dialog whose last text is the user's, and the number of tokens in its prompt."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"model": model or server.base_model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    completion = response.json()
    text = completion["choices"][0]["message"]["content"]
    return {"text": text, "prompt_tokens": completion["usage"]["prompt_tokens"]}
