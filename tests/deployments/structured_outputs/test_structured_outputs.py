"""Answers of the engine that are constrained to a schema (A1): always valid, and independent of all others."""

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.constraint import Constraint
from deployments.engine.engine import Engine
from deployments.engine.request import Delta, EngineRequest, SamplingParams
from deployments.engine.sampling import forbid, token_logprobs
from deployments.protocol.chat import ResponseFormat
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.structured_outputs.grammar import grammar_of
from deployments.text.detokenizer import Detokenizer
from deployments.text.vocabulary import Vocabulary
from tests.deployments.engine.test_engine import PROMPTS, Answers, drain
from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer

STOP = 2
FREE = SamplingParams(max_tokens=120, temperature=1.0, seed=1, stop_token_ids=(STOP,))
GREEDY = replace(FREE, temperature=0)


@pytest.fixture(scope="module")
def vocabulary(tiny_base: BaseCheckpoint) -> Vocabulary:
    return Vocabulary(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def compiler(tiny_base: BaseCheckpoint, vocabulary: Vocabulary) -> GrammarCompiler:
    return GrammarCompiler(tiny_base, load_tokenizer(tiny_base), vocabulary)


def new_engine(base: BaseCheckpoint, **changes: Any) -> Engine:
    model = load_quantized(base, Quantization(compute_dtype="float32"))
    return Engine(model, **({"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64} | changes))


@pytest.fixture(scope="module")
def loaded(tiny_base: BaseCheckpoint) -> Engine:
    return new_engine(tiny_base)


@pytest.fixture
def engine(loaded: Engine, one_thread: None) -> Iterator[Engine]:
    yield loaded
    drain(loaded)
    assert (loaded.num_running, loaded.num_waiting, loaded.num_free_blocks) == (0, 0, loaded.num_blocks)


def constraint(compiler: GrammarCompiler, schema: dict[str, Any]) -> Constraint:
    json_schema = {"name": "s", "schema": schema}
    response_format = ResponseFormat.model_validate({"type": "json_schema", "json_schema": json_schema})
    grammar = grammar_of(response_format)
    assert grammar is not None
    return asyncio.run(compiler.compile(grammar))


def text_of(token_ids: list[int], vocabulary: Vocabulary) -> str:
    detokenizer = Detokenizer(vocabulary)
    return detokenizer.push(token_ids).text + detokenizer.flush().text


def ask(engine: Engine, held_to: Constraint | None, *params: SamplingParams, n: int = 1) -> Answers:
    answers = Answers()
    for i, sampling in enumerate(params):
        prompt = PROMPTS[i % 3]
        answers.add(engine, EngineRequest(str(i), prompt, sampling, None, n=n, constraint=held_to))
    drain(engine)
    return answers


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["é", "漢字", "👩‍👩‍👧"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}

_names = st.sampled_from(["a", "name", "é", "two words", 'quo"te', "0"])
_leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[a-c]{2}$", "^(x|yz)+.$", r"^\d{1,3}%$"])),
    st.builds(lambda f: {"type": "string", "format": f}, st.sampled_from(["date", "ipv4", "uuid"])),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.builds(lambda m: {"type": "number", "minimum": m, "exclusiveMaximum": m + 3}, st.sampled_from([-0.5, 0, 7.25])),
    st.builds(lambda m: {"type": "integer", "minimum": 0, "maximum": 200, "multipleOf": m}, st.integers(1, 20)),
    st.builds(lambda v: {"enum": v}, st.lists(st.sampled_from([1, 2.5, "a", "漢", None, [1], {"b": "c"}]), min_size=1)),
)


def _composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def object_of(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
        required = list(properties)[:num_required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.one_of(
        st.builds(object_of, st.dictionaries(_names, inner, max_size=3), st.integers(0, 3)),
        st.builds(
            lambda i, n: {"type": "array", "items": i, "minItems": n, "maxItems": n + 1}, inner, st.integers(0, 2)
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda i: {"allOf": [i, {"title": "t"}]}, inner),
    )


@pytest.mark.promise("A1")
@settings(max_examples=12, deadline=None)
@given(schema=st.recursive(_leaves, _composed, max_leaves=5), seed=st.integers(0, 2**32), data=st.data())
def test_whatever_the_schema_the_answer_is_of_it(
    loaded: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary, schema: dict[str, Any], seed: int, data: Any
) -> None:
    """The model is random, so every token that the grammar allows is as good as any other to it."""
    sampled = [
        replace(FREE, max_tokens=60, seed=seed),
        replace(FREE, max_tokens=60, seed=seed, temperature=2.0, top_p=data.draw(st.sampled_from([1.0, 0.9, 0.2]))),
        replace(FREE, max_tokens=60, seed=seed, top_k=3, presence_penalty=2.0, repetition_penalty=1.5, min_tokens=9),
        replace(GREEDY, max_tokens=60, logit_bias=((STOP, 100.0), (28, -100.0))),
    ]
    answers = ask(loaded, constraint(compiler, schema), *sampled)
    for i in range(len(sampled)):
        text = text_of(answers.tokens[str(i)], vocabulary)
        if answers.reasons[str(i)] == "length":  # a string or a list may be longer
            continue
        assert answers.reasons[str(i)] == "stop", text
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@pytest.mark.promise("A1")
def test_bounded_schemas_always_end(engine: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    sampled = [
        replace(FREE, seed=seed, temperature=temperature) for seed in range(6) for temperature in (0.0, 0.7, 1.5)
    ]
    answers = ask(engine, constraint(compiler, PERSON), *sampled)
    texts = [text_of(answers.tokens[str(i)], vocabulary) for i in range(len(sampled))]
    for i, text in enumerate(texts):
        assert answers.reasons[str(i)] == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 6


@pytest.mark.promise("A1")
def test_length_may_cut_the_json(engine: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    held_to = constraint(compiler, {"type": "array", "items": {"type": "integer"}, "minItems": 500})
    answers = ask(engine, held_to, replace(FREE, max_tokens=30))
    assert answers.reasons["0"] == "length"
    assert len(answers.tokens["0"]) == 30
    assert text_of(answers.tokens["0"], vocabulary).startswith("[")


@pytest.mark.promise("A1")
def test_neither_min_tokens_nor_ignore_eos_lead_out_of_the_grammar(
    engine: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary
) -> None:
    held_to = constraint(compiler, {"enum": ["a", "ab"]})
    changes: list[dict[str, Any]] = [{"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 50, "temperature": 0}]
    answers = ask(engine, held_to, *(replace(FREE, **change) for change in changes))
    for i in range(len(changes)):
        assert answers.reasons[str(i)] == "stop"
        assert text_of(answers.tokens[str(i)], vocabulary) in ('"a"', '"ab"')
    number = constraint(compiler, {"type": "integer", "minimum": 1})
    sampled = replace(FREE, min_tokens=20, logit_bias=((STOP, 100.0),))
    answers = ask(engine, number, sampled, replace(sampled, min_tokens=0), replace(sampled, ignore_eos=True))
    assert [len(answers.tokens[str(i)]) > 1 for i in range(3)] == [True, False, True]
    assert answers.reasons["1"] == "stop"


@pytest.mark.promise("A7")
def test_each_answer_has_its_own_place_and_is_the_same_alone(
    engine: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary
) -> None:
    held_to = constraint(compiler, PERSON)
    sampled = replace(FREE, temperature=1.3, top_p=0.95, seed=11)
    together = ask(engine, held_to, sampled, n=4)
    for i in range(4):
        single = ask(engine, held_to, replace(sampled, seed=11 + i))
        assert together.tokens[f"0/{i}"] == single.tokens["0"]
        jsonschema.validate(json.loads(text_of(single.tokens["0"], vocabulary)), PERSON)
    assert len({tuple(together.tokens[f"0/{i}"]) for i in range(4)}) > 1


@pytest.mark.promise("A7")
def test_free_answers_are_bit_equal_beside_constrained_ones(engine: Engine, compiler: GrammarCompiler) -> None:
    free = [replace(FREE, max_tokens=20, logprobs=3, seed=i, temperature=i % 2) for i in range(3)]
    single = ask(engine, None, *free)
    mixed = Answers()
    held_to = constraint(compiler, PERSON)
    for i, sampling in enumerate(free):
        mixed.add(engine, EngineRequest(str(i), PROMPTS[i], sampling))
        mixed.add(engine, EngineRequest(f"held {i}", PROMPTS[i], sampling, constraint=held_to))
    drain(engine)
    for i in range(len(free)):
        assert mixed.tokens[str(i)] == single.tokens[str(i)]
        if type(engine._llama).__name__ == "CpuLlama":  # bit for bit
            assert mixed.logprobs[str(i)] == single.logprobs[str(i)]
        assert mixed.tokens[f"held {i}"] != single.tokens[str(i)]


@pytest.mark.promise("A1")
def test_a_preempted_answer_goes_on_where_it_was(
    tiny_base: BaseCheckpoint, compiler: GrammarCompiler, vocabulary: Vocabulary, one_thread: None
) -> None:
    engine = new_engine(tiny_base, kv_cache_bytes=1)  # room for one sequence of the full length
    number = {"type": "integer", "minimum": 1000, "maximum": 9999}
    numbers = {"type": "array", "items": number, "minItems": 8, "maxItems": 8}
    held_to = constraint(compiler, numbers)
    requests = [
        EngineRequest(str(i), list(range(100 * i, 100 * i + 70)), replace(FREE, seed=i), constraint=held_to)
        for i in range(6)
    ]
    single, together = Answers(), Answers()
    for request in requests:
        single.add(engine, request)
        drain(engine)
    assert engine._scheduler.num_preemptions == 0
    for request in requests:
        together.add(engine, request)
    drain(engine)
    assert engine._scheduler.num_preemptions > 0
    assert together.tokens == single.tokens
    for tokens in together.tokens.values():
        jsonschema.validate(json.loads(text_of(tokens, vocabulary)), numbers)


@pytest.mark.promise("D9")
def test_a_constraint_that_fails_ends_its_own_answer_only(
    engine: Engine, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_to = constraint(compiler, PERSON)
    expected = ask(engine, held_to, FREE).tokens["0"]
    for broken in ("allowed", "accept"):
        bad = constraint(compiler, PERSON)
        with monkeypatch.context() as patch:
            copy = bad.copy()
            patch.setattr(bad, "copy", lambda copy=copy: copy)
            patch.setattr(copy, broken, lambda *_: 1 / 0)
            answers = Answers()
            answers.add(engine, EngineRequest("bad", PROMPTS[0], FREE, constraint=bad))
            answers.add(engine, EngineRequest("good", PROMPTS[0], FREE, constraint=held_to))
            drain(engine)
        assert answers.reasons["bad"] == "error"
        assert answers.reasons["good"] == "stop"
        assert answers.tokens["good"] == expected


@pytest.mark.promise("D6")
def test_a_cancelled_answer_leaves_nothing(engine: Engine, compiler: GrammarCompiler) -> None:
    held_to = constraint(compiler, PERSON)
    received: list[Delta] = []
    engine.add_request(EngineRequest("gone", PROMPTS[0], FREE, n=3, constraint=held_to), received.extend)
    engine.step()
    engine.cancel("gone")
    num_deltas = len(received)
    assert engine.step() == 0
    assert len(received) == num_deltas
    assert not engine._requests


@pytest.mark.promise("A1")
def test_logprobs_are_among_the_allowed_tokens(
    engine: Engine, compiler: GrammarCompiler, vocabulary: Vocabulary
) -> None:
    """As vLLM reports them: the mask comes before the log-softmax."""
    answers = ask(engine, constraint(compiler, {"enum": [True, False]}), replace(FREE, logprobs=20))
    first = answers.logprobs["0"][0]
    assert sum(math.exp(logprob) for _, logprob in first.top) == pytest.approx(1, abs=1e-4)
    for token_id, _ in first.top:
        assert any(word.startswith(vocabulary.spelling(token_id)) for word in (b"true", b"false"))


def test_a_mask_leaves_what_is_allowed_and_hides_no_nan() -> None:
    logits = torch.randn(3, 21)
    logits[2, 4] = math.nan
    before = logits.clone()
    allowed = np.array([1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], np.uint8)
    mask = np.packbits(allowed, bitorder="little")
    forbid(logits, {0: mask, 2: mask})
    assert torch.equal(logits[1], before[1])
    assert logits[0].isfinite().nonzero().flatten().tolist() == [0, 2, 7, 20]
    assert torch.equal(logits[0, [0, 2, 7, 20]], before[0, [0, 2, 7, 20]])
    assert logits[2, 4].isnan()
    assert [token for token, _ in token_logprobs(logits[:1], [0], [20])[0].top] == sorted(
        [0, 2, 7, 20], key=lambda i: -before[0, i]
    )
