"""The grammar of calls (F2): what may come next in an answer with tools, token by token."""

import asyncio
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from deployments.engine.constraint import Constraint
from deployments.protocol.chat import ChatCompletionRequest
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.structured_outputs.grammar import Grammar, grammar_of
from deployments.text.tool_calls import CallArguments, CallScanner, CallStart
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.tools import HERMES, LLAMA_3_JSON, TOOL_CALL_TAGS, CallSyntax

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", 1]}, "b": {"$ref": "#/$defs/b"}},
    "required": ["a"],
    "$defs": {"b": {"type": "boolean"}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("get", "get_more")]
TOOLS.append({"type": "function", "function": {"name": "any", "parameters": {"type": "object"}}})
STOP = 2


class Kind:
    """A vocabulary and a way to write calls."""

    def __init__(self, base: BaseCheckpoint, syntax: CallSyntax, *, with_tags: bool) -> None:
        tokenizer = load_tokenizer(base)
        if with_tags:
            tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_CALL_TAGS])
        self.tag_ids = {tag: tokenizer.token_to_id(tag) for tag in TOOL_CALL_TAGS} if with_tags else {}
        self.syntax = syntax
        self.tokenizer: Tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.compiler = GrammarCompiler(base, tokenizer, self.vocabulary)

    def grammar(self, **fields: Any) -> Grammar:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS} | fields
        request = ChatCompletionRequest.model_validate(body)
        grammar = grammar_of(request.response_format, request, self.syntax, self.tag_ids)
        assert grammar is not None
        return grammar

    def start(self, grammar: Grammar, text: str = "") -> Constraint:
        constraint = asyncio.run(self.compiler.compile(grammar))
        for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
            constraint.accept(token_id)
        return constraint

    def allows(self, grammar: Grammar, text: str) -> bool:
        """Whether the grammar allows a text, and its end after it."""
        constraint = asyncio.run(self.compiler.compile(grammar))
        for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
            mask = constraint.allowed((STOP,))
            if mask is None or not mask[token_id >> 3] >> (token_id & 7) & 1:
                return False
            constraint.accept(token_id)
        mask = constraint.allowed((STOP,))
        return mask is None or bool(mask[STOP >> 3] >> STOP & 1)


@pytest.fixture(scope="module", params=["hermes", "hermes-tags", "llama-3"])
def kind(request: pytest.FixtureRequest, embedded_base: BaseCheckpoint) -> Kind:
    syntax = LLAMA_3_JSON if request.param == "llama-3" else HERMES
    return Kind(embedded_base, syntax, with_tags=request.param == "hermes-tags")


def call(kind: Kind, name: str, arguments: str) -> str:
    syntax = kind.syntax
    return f"{syntax.begin_tag}{syntax.begin}{name}{syntax.middle}{arguments}{syntax.end}{syntax.end_tag}"


@pytest.mark.promise("F2")
def test_what_an_answer_with_tools_may_be(kind: Kind) -> None:
    one, two = call(kind, "get", '{"a": "x"}'), call(kind, "get_more", '{"a": 1, "b": true}')
    both = kind.syntax.separator.join([one, two])
    auto, required = kind.grammar(), kind.grammar(tool_choice="required")
    single = kind.grammar(parallel_tool_calls=False)
    none = kind.grammar(tool_choice="none")
    named = kind.grammar(tool_choice={"type": "function", "function": {"name": "get"}})
    for text, allowed_by in (
        ("Hello <b>, there {.", [auto, single, none]),
        ("", [auto, single, none]),
        (one, [auto, single, required, named]),
        (two, [auto, single, required]),
        (both, [auto, required]),
        (kind.syntax.separator.join([one, one]), [auto, required]),  # a named function is called once
        (kind.syntax.separator.join([one, two, one, two]), []),  # nothing follows a call that was made before
        (f"Let me see.\n{one}", [auto, single]),
        (f"Let me see.\n{both}", [auto]),
    ):
        for grammar in (auto, single, required, named, none):
            assert kind.allows(grammar, text) == (grammar in allowed_by), (text, grammar)
    for bad in (
        call(kind, "get", '{"a": "y"}'),
        call(kind, "get", '{"b": true}'),
        call(kind, "get", "{}"),
        call(kind, "gett", '{"a": "x"}'),
        call(kind, "any", '{"c": 1, "c": 2}'),
        one + " Done.",
    ):
        assert not any(kind.allows(grammar, bad) for grammar in (auto, single, required, named, none)), bad
    assert kind.allows(auto, call(kind, "any", '{"c": {"d": 1}, "d": [1, 2.5]}'))


@pytest.mark.promise("F2")
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_json_content_or_calls(kind: Kind, choice: str) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    grammar = kind.grammar(response_format=response_format, tool_choice=choice)
    assert kind.allows(grammar, '{"name": "get"}') == (choice == "auto")
    assert kind.allows(grammar, call(kind, "get", '{"a": "x", "b": false}'))
    assert not kind.allows(grammar, "free text")
    assert not kind.allows(grammar, call(kind, "get", '{"a": "y"}'))


@pytest.mark.promise("F2")
def test_whatever_is_drawn_is_a_call_that_parses(kind: Kind) -> None:
    """Walks of random tokens: nothing but the grammar leads them."""
    grammar = kind.grammar(tool_choice="required", parallel_tool_calls=False)
    assert grammar.calls is not None
    draw = random.Random(0)
    for _ in range(25):
        constraint = kind.start(grammar)
        scanner = CallScanner(grammar.calls)
        parts: list[Any] = []
        for _ in range(400):
            mask = constraint.allowed()
            if mask is None:
                break
            token_id = draw.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
            constraint.accept(token_id)
            parts += scanner.push(kind.vocabulary.spelling(token_id).decode("latin-1"))
        else:
            continue  # a string without end
        [start, *rest] = parts
        assert isinstance(start, CallStart)
        arguments = json.loads("".join(part.text for part in rest if isinstance(part, CallArguments)))
        jsonschema.validate(arguments, {"type": "object"} if start.name == "any" else SCHEMA)
        assert scanner.flush() == ""


@pytest.mark.promise("F2")
def test_a_tool_without_parameters_takes_none(kind: Kind) -> None:
    for parameters in (None, {}, {"type": "object", "properties": {}}):
        tools = [{"type": "function", "function": {"name": "now", "parameters": parameters}}]
        grammar = kind.grammar(tools=tools, tool_choice="required")
        assert kind.allows(grammar, call(kind, "now", "{}")), parameters
        assert parameters or not kind.allows(grammar, call(kind, "now", '{"a": 1}'))


def test_a_tag_adds_its_text_to_an_answer(embedded_base: BaseCheckpoint) -> None:
    """Whether or not the vocabulary calls its token special."""
    for special in (False, True):
        tokenizer = load_tokenizer(embedded_base)
        tokenizer.add_tokens([AddedToken(TOOL_CALL_TAGS[0], special=special, normalized=False)])
        assert Vocabulary(tokenizer).text_bytes(tokenizer.token_to_id(TOOL_CALL_TAGS[0])) == b"<tool_call>"
