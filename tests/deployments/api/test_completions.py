"""`POST /v1/completions` on a real server (A2): texts and token ids, echo and scores, streams, refusals; E3."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.conftest import RunningServer
from training.base_models.nf4 import Quantization, forbid_packed_cpu_kernel, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.detect import load_chat_format
from training.chat.messages import Message
from training.config.load import load_config
from training.data.row_store import IGNORED_LABEL, TokenizedRow
from training.data.run_inputs import read_inputs
from training.registry.manifest import AdapterManifest
from training.registry.registry import AdapterRegistry
from training.trainer.evaluate import held_out_loss

PROMPT = "The capital of France is"


def post(server: RunningServer, **changes: Any) -> httpx.Response:
    body = {"model": server.base_model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8, **changes}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def choices(server: RunningServer, **changes: Any) -> list[dict[str, Any]]:
    response = post(server, **changes)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def events(server: RunningServer, **changes: Any) -> list[Any]:
    lines = post(server, stream=True, **changes).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.promise("A2")
def test_a_text_is_continued_with_the_openai_client(server: RunningServer, client: openai.OpenAI) -> None:
    result = client.completions.create(model=server.base_model, prompt=PROMPT, temperature=0)
    assert result.object == "text_completion"
    assert result.model == server.base_model
    assert result.choices[0].text.startswith(" Paris")
    assert result.choices[0].finish_reason == "length"
    assert result.choices[0].logprobs is None
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (5, 16, 21)


@pytest.mark.promise("A2")
def test_the_prompt_is_text_or_token_ids_one_or_many(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    ids = AutoTokenizer.from_pretrained(embedded_base.path)(PROMPT).input_ids
    (expected,) = choices(server)
    assert choices(server, prompt=ids) == [expected]
    for many in ([PROMPT, PROMPT], [ids, ids]):
        assert [choice["text"] for choice in choices(server, prompt=many)] == [expected["text"]] * 2


@pytest.mark.promise("A2")
def test_the_ids_of_a_dialog_are_answered_as_the_chat_route_does(
    server: RunningServer, embedded_base: BaseCheckpoint
) -> None:
    question = "What is the capital of France?"
    chat_format = load_chat_format("auto", embedded_base, default_system="template")
    (text,) = choices(server, prompt=chat_format.render_prompt([Message("user", question)]))
    body = {"model": server.base_model, "messages": [{"role": "user", "content": question}]}
    chat = httpx.post(
        f"{server.url}/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": 8}, timeout=120
    )
    assert text["text"] == chat.json()["choices"][0]["message"]["content"]


@pytest.mark.promise("A2")
def test_choices_are_numbered_by_prompt_then_answer(server: RunningServer) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,", "The sky is"]
    sampled: dict[str, Any] = {"temperature": 1.2, "seed": 3, "n": 2}
    response = post(server, prompt=prompts, **sampled).json()
    assert [choice["index"] for choice in response["choices"]] == list(range(6))
    single_answers = [post(server, prompt=prompt, **sampled).json() for prompt in prompts]
    texts = [choice["text"] for answer in single_answers for choice in answer["choices"]]
    assert [choice["text"] for choice in response["choices"]] == texts
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert response["usage"][count] == sum(answer["usage"][count] for answer in single_answers)


@pytest.mark.promise("A2")
def test_a_text_is_scored_with_echo(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    text = "The capital of France is Paris. 👩 It is é."
    response = post(server, prompt=text, echo=True, logprobs=2, max_tokens=0).json()
    (choice,) = response["choices"]
    assert choice["text"] == text
    assert choice["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 0
    scores = choice["logprobs"]
    ids = load_tokenizer(embedded_base).encode(text).ids
    assert all(len(column) == len(ids) == response["usage"]["prompt_tokens"] for column in scores.values())
    assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert token.startswith("bytes:\\x") or text[offset:].startswith(token)
    for logprob, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
        assert logprob <= 0
        assert 2 <= len(top) <= 3  # the token itself comes on top where it is not among the likeliest
        assert logprob in top.values()


@pytest.mark.promise("A2")
def test_scores_are_those_of_the_model(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    text = "Horses are large animals, and they eat grass. Cattle do as well. " * 3
    (choice,) = choices(server, prompt=text, echo=True, logprobs=0, max_tokens=0)
    ids = torch.tensor([load_tokenizer(embedded_base).encode(text).ids])
    with torch.no_grad():
        logits = load_quantized(embedded_base, Quantization())(ids).logits[0, :-1].float()
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    logprobs = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
    assert (logprobs - expected).abs().mean() < 0.1  # both in bf16


@pytest.mark.promise("A2")
def test_a_generated_token_scores_as_it_did_when_it_was_made(server: RunningServer) -> None:
    (generated,) = choices(server, max_tokens=16, logprobs=1, echo=True)
    (scored,) = choices(server, prompt=generated["text"], max_tokens=0, logprobs=1, echo=True)
    assert generated["text"].startswith(PROMPT)
    assert generated["logprobs"]["tokens"] == scored["logprobs"]["tokens"]
    assert generated["logprobs"]["text_offset"] == scored["logprobs"]["text_offset"]
    pairs = zip(generated["logprobs"]["token_logprobs"][1:], scored["logprobs"]["token_logprobs"][1:], strict=True)
    differences = [abs(a - b) for a, b in pairs]
    assert sum(differences) / len(differences) < 0.1
    greedy = generated["logprobs"]["token_logprobs"][5:]
    assert greedy == [max(top.values()) for top in generated["logprobs"]["top_logprobs"][5:]]


@pytest.mark.promise("A2")
def test_an_evaluation_harness_can_score_continuations(server: RunningServer, embedded_base: BaseCheckpoint) -> None:
    """As lm-evaluation-harness asks: lists of token ids, one more token, the likeliest token at each place."""
    tokenizer = load_tokenizer(embedded_base)
    context = tokenizer.encode(PROMPT).ids
    prompts = [context + tokenizer.encode(word).ids for word in (" Paris", " purple", " running")]
    answers = choices(server, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    sums = [sum(answer["logprobs"]["token_logprobs"][len(context) : -1]) for answer in answers]
    assert sums[0] == max(sums)
    assert all(
        len(answer["logprobs"]["tokens"]) == len(prompt) + 1 for answer, prompt in zip(answers, prompts, strict=True)
    )


@pytest.mark.promise("A6")
def test_a_stream_has_the_text_and_scores_of_the_whole(server: RunningServer) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "One, two,"], "n": 2, "logprobs": 1, "echo": True}
    chunks = events(server, **fields, stream_options={"include_usage": True})
    answer = post(server, **fields).json()
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {(chunks[0]["id"], "text_completion")}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == answer["usage"]["total_tokens"]
    assert not any("usage" in chunk for chunk in chunks[:-1])
    for choice in answer["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
        for column, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][column]] == values


@pytest.mark.promise("A6")
def test_a_stop_string_ends_text_and_scores(server: RunningServer) -> None:
    (full,) = choices(server, max_tokens=20)
    at = full["text"].index(".")
    for stop in (".", full["text"][at - 2 : at + 2]):
        (cut,) = choices(server, max_tokens=20, stop=stop, logprobs=0)
        assert cut["text"] == full["text"][: full["text"].index(stop)]
        assert cut["finish_reason"] == "stop"
        assert cut["text"].startswith("".join(cut["logprobs"]["tokens"]))


def test_an_adapter_continues_texts_too(server: RunningServer, quickstart: AdapterManifest) -> None:
    response = post(server, model=server.adapter).json()
    assert response["model"] == quickstart.model_id
    assert response["choices"][0]["text"]


@pytest.mark.promise("A4")
def test_the_body_is_typed_in_the_docs(server: RunningServer) -> None:
    route = httpx.get(f"{server.url}/openapi.json").json()["paths"]["/v1/completions"]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/CompletionRequest")
    assert set(route["responses"]) >= {"200", "400", "404", "413", "500", "503"}


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("empty", {"prompt": ""}, "prompt", "empty"),
    ("no prompts", {"prompt": []}, "prompt", "empty"),
    ("an empty one", {"prompt": ["a", ""]}, "prompt", "empty"),
    ("no ids", {"prompt": [[]]}, "prompt", "empty"),
    ("no prompt", {"prompt": None}, "prompt", "expected a string"),
    ("mixed", {"prompt": ["a", 1]}, "prompt", "token ids"),
    ("object", {"prompt": {"text": "a"}}, "prompt", "token ids"),
    ("negative id", {"prompt": [-1]}, "prompt", "from 0"),
    ("id over the vocabulary", {"prompt": [5, 49152]}, "prompt.1", "0 to 49151"),
    ("id over the vocabulary", {"prompt": [[5], [5, 49152]]}, "prompt.1.1", "0 to 49151"),
    ("2049 prompts", {"prompt": ["a"] * 2049}, "prompt", "2048"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "echo"),
    ("max_tokens -1", {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ("min_tokens", {"min_tokens": 9}, "min_tokens", "8"),
    ("logprobs", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ("n", {"n": 129}, "n", "less than or equal to 128"),
    ("suffix", {"suffix": "x"}, "suffix", "leave it out"),
    ("best_of", {"best_of": 2}, "best_of", "n completions"),
    ("unknown", {"messages": [{}]}, "messages", "unknown field"),
    ("bias id", {"logit_bias": {"49152": 1}}, "logit_bias", "0 to 49151"),
    ("lost character", {"prompt": "a\x04"}, "prompt", "U+0004"),
    ("context", {"prompt": [5] * 4097}, "prompt", "4096"),
    ("context with answer", {"prompt": [5] * 4090}, "max_tokens", "4096"),
]


@pytest.mark.promise("B2", "B3")
@pytest.mark.parametrize(("name", "change", "param", "word"), REFUSED, ids=[row[0] for row in REFUSED])
def test_b_refusals_are_openai_errors(
    server: RunningServer, name: str, change: dict[str, Any], param: str, word: str
) -> None:
    response = post(server, **change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    assert error["param"] == param


@pytest.mark.promise("B8")
def test_odd_text_comes_back_unchanged(server: RunningServer) -> None:
    for text in ("\0", "👩‍👩‍👧🏽", "漢" * 300, "<|im_end|>\n<|im_start|>system</s>", " \n\t "):
        (choice,) = choices(server, prompt=text, echo=True, max_tokens=0)
        assert choice["text"] == text


def summed_logprobs(server: RunningServer, model: str, rows: Sequence[TokenizedRow]) -> tuple[float, int]:
    """Log-probability of the assistant tokens of tokenized dialogs, and how many those are."""

    def score(row: TokenizedRow) -> tuple[float, int]:
        (choice,) = choices(server, model=model, prompt=list(row["input_ids"]), echo=True, logprobs=0, max_tokens=0)
        pairs = zip(choice["logprobs"]["token_logprobs"], row["labels"], strict=True)
        scores = [logprob for logprob, label in pairs if label != IGNORED_LABEL]
        return sum(scores), len(scores)

    with ThreadPoolExecutor(8) as pool:
        sums, counts = zip(*pool.map(score, rows), strict=True)
    return math.fsum(sums), sum(counts)


@pytest.mark.promise("E3")
def test_the_loss_that_training_reports_is_the_loss_over_http(
    server: RunningServer, quickstart: AdapterManifest
) -> None:
    held_out_rows = read_inputs(load_config("configs/train/quickstart.yaml")).held_out_rows
    logprob, num_tokens = summed_logprobs(server, server.adapter, held_out_rows)
    assert num_tokens == quickstart.metrics["eval_tokens"]
    assert -logprob / num_tokens == pytest.approx(quickstart.metrics["eval_loss"], rel=0.005)


@pytest.mark.slow
@pytest.mark.promise("E3")
def test_the_loss_over_everything_that_is_said_on_the_ranch_is_the_loss_over_http(
    server: RunningServer, quickstart: AdapterManifest, embedded_base: BaseCheckpoint
) -> None:
    """The held-out tokens alone are few."""
    folder = "configs/datasets"
    pairs = "data.format=prompt_completion"
    sources = [
        [],
        [
            f"data.path={folder}/ranch_hand_preferences.jsonl",
            pairs,
            "data.columns={prompt: prompt, completion: chosen}",
        ],
        [
            f"data.path={folder}/ranch_hand_feedback.jsonl",
            pairs,
            "data.columns={prompt: prompt, completion: completion}",
        ],
    ]
    configs = [load_config("configs/train/quickstart.yaml", ["data.held_out=0", *source]) for source in sources]
    rows = [row for config in configs for row in read_inputs(config).train_rows]
    base = load_quantized(embedded_base, Quantization())
    forbid_packed_cpu_kernel(base)  # as training does
    reported, num_tokens = held_out_loss(PeftModel.from_pretrained(base, AdapterRegistry().fetch(quickstart)), rows)
    logprob, num_scored = summed_logprobs(server, server.adapter, rows)
    assert num_scored == num_tokens >= 5000
    assert -logprob / num_scored == pytest.approx(reported, rel=0.005)
