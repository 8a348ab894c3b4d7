"""A7: the same seed, model version and request give the same text, alone and beside other traffic, over HTTP.

On the tiny model every token is computed as the engine computes a large one's; its context lets hundreds of requests
run in seconds, so batches of many shapes are met.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import InProcessApi

HORSES = "Tell me about horses, cattle and sheep, and what they eat all day long on the prairie. " * 2
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {"temperature": 0}),
    ("sampled", {"temperature": 1.3}),
    ("filters", {"temperature": 1.5, "top_p": 0.9, "top_k": 400, "min_p": 0.001}),
    ("small top_p", {"temperature": 2, "top_p": 0.3}),
    ("penalties", {"presence_penalty": 1.5, "frequency_penalty": 1, "repetition_penalty": 1.3}),
    ("bias", {"temperature": 1.8, "logit_bias": {"28120": 4, "5": -100}}),
    ("n", {"temperature": 1.5, "n": 4}),
    ("n streamed", {"temperature": 1.5, "n": 3, "stream": True}),
    ("stop", {"temperature": 1.7, "stop": ["a", "e"], "min_tokens": 3}),
    ("logprobs", {"temperature": 1.5, "logprobs": True, "top_logprobs": 4}),
    ("a reused prefix", {"temperature": 1.4, "messages": [{"role": "user", "content": HORSES}]}),
]


def outcomes(api: InProcessApi, body: dict[str, Any]) -> list[Any]:
    """Text and reason of each answer, and its log-probabilities where they were asked for."""
    response = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        choices = response.json()["choices"]
        return [(choice["message"]["content"], choice["finish_reason"], choice["logprobs"]) for choice in choices]
    texts: dict[int, str] = {}
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return [texts[index] for index in sorted(texts)]


def neighbours(api: InProcessApi, rng: random.Random) -> list[dict[str, Any]]:
    """Other users' requests: both models, all lengths, some long enough to be computed in chunks."""
    return [
        {
            "model": rng.choice([api.base.name, api.adapter]),
            "messages": [{"role": "user", "content": HORSES[: rng.choice([1, 9, 60, 170])]}],
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0, 1, 2]),
            "n": rng.choice([1, 1, 3]),
            "ignore_eos": True,
        }
        for _ in range(24)
    ]


@pytest.mark.promise("A7")
@pytest.mark.parametrize("which", [pytest.param("base", marks=pytest.mark.slow), "adapter"])
def test_same_seed_same_text_alone_and_in_any_batch(tiny_api: InProcessApi, which: str) -> None:
    model = tiny_api.base.name if which == "base" else f"{tiny_api.adapter}@1"
    user = {"role": "user", "content": "hi"}
    common = {"model": model, "messages": [user], "seed": 11, "max_tokens": 24, "ignore_eos": True}
    bodies = [common | fields for _, fields in REQUESTS]
    single_answers = [outcomes(tiny_api, body) for body in bodies]  # the long prompt's first time: nothing to reuse
    assert [outcomes(tiny_api, body) for body in bodies] == single_answers
    rng = random.Random(which)
    for _ in range(4):
        batch = neighbours(tiny_api, rng) + bodies
        rng.shuffle(batch)
        with ThreadPoolExecutor(len(batch)) as pool:
            answers = list(pool.map(lambda body: outcomes(tiny_api, body), batch))
        for (name, _), body, single in zip(REQUESTS, bodies, single_answers, strict=True):
            assert answers[batch.index(body)] == single, name
    other = [outcomes(tiny_api, body | {"seed": 12}) for body in bodies]
    assert other[0] == single_answers[0]  # greedy
    assert all(answer != single for answer, single in zip(other[1:], single_answers[1:], strict=True))


@pytest.mark.promise("A7", "A8")
def test_and_a_reused_prefix_changes_the_count_and_not_the_text(tiny_api: InProcessApi) -> None:
    prompt = [random.Random(0).randint(10, 49_000) for _ in range(90)]
    body = {"model": tiny_api.adapter, "prompt": prompt, "seed": 5, "temperature": 1.5, "max_tokens": 20}
    first, second = (httpx.post(f"{tiny_api.url}/v1/completions", json=body, timeout=120).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached[0] == 0
    assert 32 <= cached[1] < len(prompt)


@pytest.mark.promise("A8")
def test_counts_are_those_of_the_tokenizer(tiny_api: InProcessApi) -> None:
    """Prompt tokens once for each prompt; the answers' tokens as their log-probabilities list them."""
    from training.base_models.tokenizer import load_tokenizer
    from training.chat.detect import load_chat_format
    from training.chat.messages import Message

    chat_format = load_chat_format("auto", tiny_api.base, load_tokenizer(tiny_api.base))
    dialog = [{"role": "system", "content": "Be brief. é漢👩"}, {"role": "user", "content": HORSES}]
    body = {"model": tiny_api.base.name, "messages": dialog, "max_tokens": 9, "n": 3, "seed": 1, "logprobs": True}
    answer = httpx.post(f"{tiny_api.url}/v1/chat/completions", json=body, timeout=120).json()
    rendered = chat_format.render_prompt([Message(m["role"], m["content"]) for m in dialog])  # type: ignore[arg-type]
    num_made = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
    assert answer["usage"]["prompt_tokens"] == len(rendered)
    assert answer["usage"]["completion_tokens"] == num_made
    assert answer["usage"]["total_tokens"] == len(rendered) + num_made
