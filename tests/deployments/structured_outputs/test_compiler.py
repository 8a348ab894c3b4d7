"""Grammars of both kinds of tokenizers: which text matches a schema (A1), and what is refused, in time (B9)."""

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.engine.constraint import Constraint, ConstraintFault
from deployments.errors import NotReady, ResponseFormatRefused
from deployments.protocol.chat import ResponseFormat
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.structured_outputs.grammar import Grammar, grammar_of
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
STOP = 2  # `<|im_end|>` of the embedded model, `</s>` of Llama 2


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> BaseCheckpoint:
    """The SentencePiece kind: a space before a text, and bytes as tokens of their own. Ids without gaps, as real."""
    path = tmp_path_factory.mktemp("llama2")
    content = json.loads((FIXTURES / "llama2_reduced_tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for i, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "config.json").write_text(json.dumps({"vocab_size": len(vocab) + 7}))
    return BaseCheckpoint("llama2", str(path), path, None)


def new_compiler(base: BaseCheckpoint, **options: Any) -> GrammarCompiler:
    tokenizer = load_tokenizer(base)
    return GrammarCompiler(base, tokenizer, Vocabulary(tokenizer), **options)


@pytest.fixture(scope="module")
def compilers(
    embedded_base: BaseCheckpoint, llama2: BaseCheckpoint
) -> dict[str, tuple[BaseCheckpoint, GrammarCompiler]]:
    return {
        "embedded": (embedded_base, new_compiler(embedded_base)),
        "llama2": (llama2, new_compiler(llama2)),
    }


def grammar(schema: dict[str, Any] | None = None, *, strict: bool = False) -> Grammar:
    fields: dict[str, Any] = {"type": "json_object"}
    if schema is not None:
        fields = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": strict}}
    compilable = grammar_of(ResponseFormat.model_validate(fields))
    assert compilable is not None
    return compilable


def compiled(compiler: GrammarCompiler, schema: dict[str, Any] | None = None) -> Constraint:
    return asyncio.run(compiler.compile(grammar(schema)))


def ids_in(mask: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def is_of(constraint: Constraint, token_ids: list[int]) -> bool:
    """Whether the tokens, each allowed by the mask before it, are a complete text of the grammar."""
    for token_id in token_ids:
        mask = constraint.allowed((STOP,))
        if mask is None or token_id not in ids_in(mask):
            return False
        constraint.accept(token_id)
    mask = None if constraint.complete else constraint.allowed((STOP,))
    return mask is None or STOP in ids_in(mask)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "tags": {"enum": ["a", "b"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXTS: list[tuple[dict[str, Any] | None, str, bool]] = [
    (PERSON, '{"name": "Ada", "age": 36, "tags": "a"}', True),
    (PERSON, '{"name":"Ada","age":36}', True),
    (PERSON, '{"name": "漢字 é 👩‍👩‍👧🏽", "age": 0}', True),  # characters of several tokens
    (PERSON, '{"name": "a\\n\\"b\\"", "age": 0}', True),
    (PERSON, '{"name": "Ada"}', False),
    (PERSON, '{"name": "Ada", "age": -1}', False),
    (PERSON, '{"name": "Ada", "age": 36, "more": 1}', False),
    (PERSON, '{"name": "Ada", "age": 36} ', False),
    (PERSON, '{"name":  "Ada", "age": 36}', False),  # whitespace is bounded: models loop on it
    (PERSON, '{"name": "a\nb", "age": 0}', False),
    (None, '{"a": [1, {"b": null}, "c"], "d": {"e": [[]]}, "f": -1.5e3}', True),
    (None, "[1]", False),
    (None, '{"a": 01}', False),
    ({"type": "integer"}, "12", True),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "[true, false]", True),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "[true, false, true]", False),
    ({"type": "string", "pattern": "^[a-z]{2}$"}, '"ab"', True),
    ({"type": "string", "pattern": "^[a-z]{2}$"}, '"abc"', False),
    ({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, "[[], [[]]]", True),
]


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kind", ["embedded", "llama2"])
@pytest.mark.parametrize(("schema", "text", "expected"), TEXTS)
def test_a_text_is_of_its_schema_in_both_kinds_of_tokenizers(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]],
    kind: str,
    schema: dict[str, Any] | None,
    text: str,
    expected: bool,
) -> None:
    base, compiler = compilers[kind]
    tokenizer = load_tokenizer(base)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    if kind == "llama2":
        assert tokenizer.id_to_token(token_ids[0]).startswith("▁")  # which is not part of the text
    assert is_of(compiled(compiler, schema), token_ids) is expected


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kind", ["embedded", "llama2"])
def test_characters_can_be_written_byte_by_byte(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]], kind: str
) -> None:
    base, compiler = compilers[kind]
    tokenizer = load_tokenizer(base)
    vocabulary = Vocabulary(tokenizer)
    of_bytes = {vocabulary.text_bytes(i): i for i in sorted(tokenizer.get_vocab().values(), reverse=True)}
    token_ids = [of_bytes[bytes([byte])] for byte in '"é漢👩"'.encode()]
    assert is_of(compiled(compiler, {"type": "string"}), token_ids)
    assert not is_of(compiled(compiler, {"type": "string"}), [*token_ids[:2], *token_ids[3:]])  # half an é


@pytest.mark.promise("A1")
@pytest.mark.parametrize("kind", ["embedded", "llama2"])
def test_the_end_is_allowed_where_the_text_may_end_and_no_control_token_ever(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]], kind: str
) -> None:
    base, compiler = compilers[kind]
    tokenizer = load_tokenizer(base)
    controls = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    constraint = compiled(compiler, {"type": "integer", "minimum": 10, "maximum": 99})
    masks = [constraint.allowed((STOP,))]
    for char in "1", "2":
        constraint.accept(tokenizer.token_to_id(char))
        masks.append(constraint.allowed((STOP,)))
    assert masks[2] is None
    for mask in masks[:2]:
        assert not ids_in(mask) & controls
    number = compiled(compiler, {"type": "integer"})
    assert STOP not in ids_in(number.allowed((STOP,)))
    number.accept(tokenizer.token_to_id("1"))
    assert ids_in(number.allowed((STOP,))) & controls == {STOP}
    assert not ids_in(number.allowed()) & controls
    with pytest.raises(ConstraintFault):
        number.accept(tokenizer.token_to_id("{"))


def chain(length: int) -> dict[str, Any]:
    """Definitions that each lead to the next: the library recurses along them."""
    links = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(length)}
    return {"$defs": links | {f"a{length}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def pattern(of: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": of}}, "required": ["a"]}


HOSTILE: dict[str, dict[str, Any]] = {
    "$ref to itself": {"$ref": "#"},
    "$ref loop": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "$ref loop with siblings": {
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"minLength": 1}]}},
        "$ref": "#/$defs/a",
    },
    "$ref to nothing": {"$ref": "#/$defs/none"},
    "$ref chain": chain(1500),
    "doubling allOf": {
        "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(24)}
        | {"a24": {"maxItems": 3}},
        "$ref": "#/$defs/a0",
    },
    "anyOf products": {
        "allOf": [{"anyOf": [{"properties": {f"p{j}": {"const": i}}} for i in range(6)]} for j in range(12)]
    },
    "enum of 1e5": {"enum": [f"value {i}" for i in range(100_000)]},
    "enum of 4000": {"enum": [f"value {i}" for i in range(4000)]},
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "(a+)+$": pattern("(a+)+$"),
    "^(([a-z])+.)+[A-Z]([a-z])+$": pattern("^(([a-z])+.)+[A-Z]([a-z])+$"),
    "a{100}^4": pattern("((((a{100}){100}){100}){100})"),
    "exponential automaton": pattern("^(.{1,100}e){40}$"),
    "look-ahead": pattern("(?=a)b"),
    "parentheses": pattern("(" * 500 + ")" * 500),
    "minItems": {"type": "array", "items": {"type": "integer"}, "minItems": 10**12},
    "maxItems": {"type": "array", "items": {"type": "object"}, "maxItems": 10**9},
    "maxLength": {"type": "string", "minLength": 10**6, "maxLength": 10**12},
    "multipleOf": {"type": "integer", "multipleOf": 99_999_937},
    "no value": {"type": "string", "minLength": 5, "maxLength": 3},
    "not a schema": {"type": "object", "properties": {"a": 3}},
}


@pytest.mark.promise("B9")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_or_followed_within_2_s(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]], name: str
) -> None:
    _, compiler = compilers["embedded"]
    refusal: ResponseFormatRefused | None = None
    started = time.process_time()
    try:
        constraint = compiled(compiler, HOSTILE[name])
    except ResponseFormatRefused as error:
        refusal = error
    if refusal is not None:
        assert (refusal.param or "").startswith("response_format.json_schema.schema")
        assert len(str(refusal)) < 600
    else:
        slowest, rng = 0.0, np.random.default_rng(0)
        for _ in range(60):  # in every state, the mask is computed in time for the engine's step
            step = time.thread_time()
            try:
                mask = constraint.allowed((STOP,))
                if mask is None:
                    break
                token_id = int(rng.choice(sorted(ids_in(mask))))
                slowest = max(slowest, time.thread_time() - step)
                if token_id == STOP:
                    break
                constraint.accept(token_id)
            except ConstraintFault:
                break
        assert slowest < 0.3
    assert time.process_time() - started < 2


@pytest.mark.promise("B9")
def test_the_event_loop_goes_on_while_a_schema_compiles(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]],
) -> None:
    _, compiler = compilers["embedded"]

    async def num_turns() -> int:
        task = asyncio.create_task(compiler.compile(grammar({"type": "integer", "multipleOf": 9973})))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.0005)
            turns += 1
        await task
        return turns

    assert asyncio.run(num_turns()) > 5  # one or two, if it were compiled between two of them


@pytest.mark.promise("B9")
def test_what_takes_too_long_is_refused_and_what_waits_behind_it_told_to_come_again(
    embedded_base: BaseCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = new_compiler(embedded_base, timeout_s=0.2)
    go_on = threading.Event()
    compile_grammar = compiler._compile

    def slow(grammar: str) -> Constraint:
        go_on.wait(10)
        return compile_grammar(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)

    async def both() -> list[Any]:
        requests = [compiler.compile(grammar({"type": kind})) for kind in ("integer", "integer", "string")]
        results = await asyncio.gather(*requests, return_exceptions=True)
        go_on.set()
        compiler._timeout_s = 60.0
        return [*results, await compiler.compile(grammar({"type": "string"}))]

    first, same, waiting, retried = asyncio.run(both())
    assert isinstance(first, ResponseFormatRefused)
    assert isinstance(same, ResponseFormatRefused)
    assert "0.2 s" in str(first)
    assert isinstance(waiting, NotReady)
    assert isinstance(retried, Constraint)


@pytest.mark.promise("B9")
def test_many_requests_for_a_schema_compile_it_once_and_the_cache_is_bounded(
    embedded_base: BaseCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = new_compiler(embedded_base, cache_size=3)
    compiled_texts: list[Grammar] = []
    compile_grammar = compiler._compile

    def counted(text: Grammar) -> Constraint:
        compiled_texts.append(text)
        return compile_grammar(text)

    monkeypatch.setattr(compiler, "_compile", counted)
    texts = [grammar({"const": i}) for i in range(5)]

    async def ask() -> None:
        same = await asyncio.gather(*(compiler.compile(texts[0]) for _ in range(8)))
        assert len({id(constraint) for constraint in same}) == 8  # each its own place
        for text in [texts[1], texts[0], texts[2], texts[3], texts[0]]:  # the least recently used one is evicted
            await compiler.compile(text)
        assert compiled_texts == [texts[0], texts[1], texts[2], texts[3]]
        await compiler.compile(texts[1])
        assert compiled_texts[4:] == [texts[1]]
        refused = grammar({"type": "string", "pattern": "("})
        for _ in range(2):
            with pytest.raises(ResponseFormatRefused, match="unclosed group"):
                await compiler.compile(refused)
        assert len(compiled_texts) == 6
        assert len(compiler._compiled) == 3

    asyncio.run(ask())


@pytest.mark.promise("B9")
def test_a_caller_that_leaves_does_not_stop_the_others(embedded_base: BaseCheckpoint) -> None:
    compiler = new_compiler(embedded_base)

    async def leave() -> Constraint:
        text = grammar({"type": "integer", "multipleOf": 7919})
        leaver, other = (asyncio.create_task(compiler.compile(text)) for _ in range(2))
        await asyncio.sleep(0)
        leaver.cancel()
        return await other

    assert isinstance(asyncio.run(leave()), Constraint)


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use anyOf"),
        ({"$ref": "#"}, "no JSON can match it"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
    ],
)
def test_what_the_library_does_not_take_is_said_in_one_line(
    compilers: dict[str, tuple[BaseCheckpoint, GrammarCompiler]], schema: dict[str, Any], words: str
) -> None:
    _, compiler = compilers["embedded"]
    with pytest.raises(ResponseFormatRefused, match=re.escape(words)) as exc_info:
        compiled(compiler, schema)
    assert "\n" not in str(exc_info.value)


@pytest.mark.promise("A1")
def test_text_is_free() -> None:
    assert grammar_of(None) is None
    assert grammar_of(ResponseFormat(type="text")) is None
