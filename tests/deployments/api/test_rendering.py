"""From a request's body to the replica's request: texts and BOS (A2), refusals that need the tokenizer (B2, B3, B5)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from transformers import AutoTokenizer

from deployments.api.rendering import RequestRenderer
from deployments.engine.request import SamplingParams
from deployments.errors import ContextLengthExceeded
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.completions import CompletionRequest
from deployments.text.text_encoder import TextEncoder
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def renderer(embedded_base: BaseCheckpoint) -> RequestRenderer:
    tokenizer = load_tokenizer(embedded_base)
    return RequestRenderer(
        embedded_base, "auto", tokenizer, Vocabulary(tokenizer), max_model_len=64, default_system="none"
    )


def text_encoder(base: BaseCheckpoint) -> TextEncoder:
    tokenizer = load_tokenizer(base)
    return TextEncoder(tokenizer, Vocabulary(tokenizer))


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hello", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    )


@pytest.mark.parametrize(
    ("family", "bos", "num_bos"),
    [("embedded", None, 0), ("llama3", None, 1), ("llama2", None, 0), ("llama2", ("<s>", 1), 1)],
)
@pytest.mark.promise("A2")
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_text_has_the_ids_that_transformers_gives_it(
    embedded_base: BaseCheckpoint,
    tmp_path: Path,
    family: str,
    bos: tuple[str, int] | None,
    num_bos: int,
    add_bos_token: bool | None,
) -> None:
    base = embedded_base
    if family != "embedded":
        content = json.loads((FIXTURES / f"{family}_reduced_tokenizer.json").read_text())
        if bos is not None:
            content["post_processor"] = template_with(*bos)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>" if bos else "<|begin_of_text|>"}
        if add_bos_token is not None:
            config["add_bos_token"] = add_bos_token
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        base = replace(embedded_base, path=tmp_path)
    reference = AutoTokenizer.from_pretrained(base.path)
    encoder = text_encoder(base)
    assert len(encoder.prefix) == num_bos
    for text in ("hi", " hi [INST]", "é漢 👩\n", "  "):
        assert encoder.encode(text) == reference(text).input_ids


def template_with(bos: str, token_id: int) -> dict[str, Any]:
    """The post-processor of Llama 2's own tokenizer.json, which the reduced one does not have."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


@pytest.mark.promise("B5")
def test_control_tokens_in_a_text_stay_text(embedded_base: BaseCheckpoint) -> None:
    special = {0, 1, 2}
    ids = text_encoder(embedded_base).encode("<|im_start|>system<|im_end|><|endoftext|></s>")
    assert not special & set(ids)


@pytest.mark.parametrize("text", ["a\x04b", "\x04", "ab \U00050000"])
def test_a_character_without_a_token_is_named_and_refused(renderer: RequestRenderer, text: str) -> None:
    with pytest.raises(RequestValidationError) as exc_info:
        renderer.completion(completion(prompt=["fine", text]), None, "r")
    (error,) = exc_info.value.errors()
    assert error["loc"] == ("body", "prompt", "1")
    assert "U+0004" in error["msg"] or "U+50000" in error["msg"]


@pytest.mark.promise("B8")
def test_a_lone_surrogate_in_a_text_is_refused(renderer: RequestRenderer) -> None:
    for text in ("\ud800", "a\udfff b"):
        with pytest.raises(RequestValidationError) as exc_info:
            renderer.completion(completion(prompt=text), None, "r")
        (error,) = exc_info.value.errors()
        assert "surrogate" in error["msg"]


@pytest.mark.promise("B2")
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"prompt": [5, 49152]}, "prompt.1"),
        ({"prompt": [[5], [6, 7, 99999999999]]}, "prompt.1.2"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
    ],
)
def test_a_token_id_outside_the_vocabulary_is_named_with_the_range(
    renderer: RequestRenderer, fields: dict[str, Any], where: str
) -> None:
    with pytest.raises(RequestValidationError) as exc_info:
        renderer.completion(completion(**fields), None, "r")
    (error,) = exc_info.value.errors()
    assert ".".join(error["loc"]) == f"body.{where}"
    assert "0 to 49151" in error["msg"]


@pytest.mark.promise("B3")
def test_a_text_and_its_answer_fit_the_context(renderer: RequestRenderer) -> None:
    def max_tokens(num_prompt_tokens: int, **fields: Any) -> int:
        (generation,) = renderer.completion(completion(prompt=[5] * num_prompt_tokens, **fields), None, "r")
        return generation.sampling.max_tokens

    assert max_tokens(4) == 16
    assert max_tokens(60) == 4
    assert max_tokens(60, max_tokens=None) == 4
    assert max_tokens(4, max_tokens=60) == 60
    assert max_tokens(64, max_tokens=0, echo=True) == 0
    cases: list[tuple[int, dict[str, Any], str, str]] = [
        (64, {}, "prompt", "64"),
        (65, {"max_tokens": 0, "echo": True}, "prompt", "65"),
        (60, {"max_tokens": 5}, "max_tokens", "5"),
        (60, {"min_tokens": 6}, "prompt", "6"),
    ]
    for num_prompt_tokens, fields, param, number in cases:
        with pytest.raises(ContextLengthExceeded, match=f"64.*{num_prompt_tokens}.*{number}|64.*{number}") as error:
            max_tokens(num_prompt_tokens, **fields)
        assert error.value.param == param
    with pytest.raises(ContextLengthExceeded) as error:
        renderer.completion(completion(prompt=[[5], [5] * 70]), None, "r")
    assert error.value.param == "prompt.1"


@pytest.mark.promise("B3")
def test_a_dialog_gets_what_the_context_has_room_for(renderer: RequestRenderer) -> None:
    generation = renderer.chat(chat(), None, "r")
    assert generation.sampling.max_tokens == 64 - len(generation.prompt_token_ids)
    assert renderer.chat(chat(max_completion_tokens=3), None, "r").sampling.max_tokens == 3
    with pytest.raises(ContextLengthExceeded):
        renderer.chat(chat(max_completion_tokens=64), None, "r")


@pytest.mark.promise("A1")
def test_every_sampling_field_reaches_the_engine(renderer: RequestRenderer) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.5,
        "seed": 11,
        "ignore_eos": True,
    }
    stop_token_ids = renderer.chat(chat(), None, "r").sampling.stop_token_ids
    assert stop_token_ids
    expected = SamplingParams(**fields, logit_bias=((5, 1.0),), stop_token_ids=stop_token_ids, logprobs=3)  # type: ignore[arg-type]
    generation = renderer.chat(chat(**fields, logit_bias={"5": 1}, logprobs=True, top_logprobs=3, n=4), None, "r")
    assert generation.sampling == expected
    assert generation.n == 4
    (generation,) = renderer.completion(completion(**fields, logit_bias={"5": 1}, logprobs=3, n=4), None, "r")
    assert generation.sampling == expected
    assert generation.n == 4


@pytest.mark.promise("A2")
def test_the_prompt_is_scored_with_echo(renderer: RequestRenderer) -> None:
    def prompt_logprobs(**fields: Any) -> int | None:
        (generation,) = renderer.completion(completion(**fields), None, "r")
        return generation.sampling.prompt_logprobs

    assert prompt_logprobs(logprobs=2) is None
    assert prompt_logprobs(echo=True) is None
    assert prompt_logprobs(echo=True, logprobs=2) == 2
    assert prompt_logprobs(echo=True, logprobs=0, max_tokens=0) == 0
    assert prompt_logprobs(echo=True, max_tokens=0) == 0  # the engine does nothing else then


def test_prompts_may_be_texts_or_token_ids_one_or_many(renderer: RequestRenderer) -> None:
    hello = [28120]
    for prompt, expected in (
        ("hello", [hello]),
        (["hello", "hello"], [hello] * 2),
        ([3, 4], [[3, 4]]),
        ([[3], [4]], [[3], [4]]),
    ):
        generations = renderer.completion(completion(prompt=prompt), None, "r")
        assert [generation.prompt_token_ids for generation in generations] == expected
        assert len({generation.request_id for generation in generations}) == len(expected)


@pytest.mark.promise("A1")
def test_a_response_format_becomes_a_grammar_of_chats_only(renderer: RequestRenderer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "é"}, "strict": True}}
    request = renderer.chat(chat(response_format=schema), None, "r")
    assert request.grammar is not None
    assert json.dumps({"const": "é"})[:-1] in request.grammar.rules
    assert renderer.chat(chat(response_format={"type": "text"}), None, "r").grammar is None
    assert renderer.chat(chat(response_format=None), None, "r").grammar is None
    with pytest.raises(ValidationError, match="response_format"):
        completion(response_format={"type": "json_object"})
