"""No key twice in an object and no number without end, whatever is sampled (A1)."""

import asyncio
import json
import random
import re
from typing import Any

import pytest

from deployments.engine.constraint import Constraint
from deployments.protocol.chat import ResponseFormat
from deployments.structured_outputs.compiler import GrammarCompiler
from deployments.structured_outputs.grammar import grammar_of
from deployments.text.vocabulary import Vocabulary
from tests.deployments.structured_outputs.test_compiler import ids_in
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer

OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
# Pieces that a text of few keys and many digits is made of; escapes, and tokens that hold more than one quote.
PIECES = re.compile(rb'[ab01]|\d+|[{}\[\]:,"]|\\n|\\u00|1f|",? ?"|"?: ?"?|\{"|,? ?"[ab]?|[ab]"|[ab]":|-|\.|e|"":|\[\]')


@pytest.fixture(scope="module")
def compiler(embedded_base: BaseCheckpoint) -> GrammarCompiler:
    tokenizer = load_tokenizer(embedded_base)
    return GrammarCompiler(embedded_base, tokenizer, Vocabulary(tokenizer))


@pytest.fixture(scope="module")
def spellings(embedded_base: BaseCheckpoint) -> list[bytes]:
    tokenizer = load_tokenizer(embedded_base)
    vocabulary = Vocabulary(tokenizer)
    return [vocabulary.spelling(i) for i in range(tokenizer.get_vocab_size())]


def start(compiler: GrammarCompiler, fields: dict[str, Any]) -> Constraint:
    grammar = grammar_of(ResponseFormat.model_validate(fields))
    assert grammar is not None
    return asyncio.run(compiler.compile(grammar))


def no_pair_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


def written(constraint: Constraint, spellings: list[bytes], seed: int, num_tokens: int = 300) -> bytes:
    """A text of tokens drawn by chance, most of them pieces; what closes it is preferred toward the end."""
    chance = random.Random(seed)
    text = b""
    for i in range(num_tokens):
        mask = None if constraint.complete else constraint.allowed()
        if mask is None:
            break
        allowed = ids_in(mask)
        pieces = [token_id for token_id in allowed if PIECES.fullmatch(spellings[token_id])]
        closing = [token_id for token_id in pieces if spellings[token_id] in (b'"', b"}", b"]")]
        wanted = closing if i > num_tokens - 60 and closing else pieces or sorted(allowed)
        token_id = chance.choice(sorted(wanted))
        constraint.accept(token_id)
        text += spellings[token_id]
    return text


@pytest.mark.promise("A1")
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["json_object", "open"])
def test_no_object_has_a_key_twice(compiler: GrammarCompiler, spellings: list[bytes], seed: int, kind: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": OPEN}}
    text = written(start(compiler, schema if kind == "open" else {"type": "json_object"}), spellings, seed)
    prefixes = [text] + [text[:i] + b"}" * n for i in range(len(text), 0, -1) for n in range(3)]
    for prefix in prefixes:  # the longest part of it that is JSON
        try:
            content = json.loads(prefix, object_pairs_hook=no_pair_twice)
        except (ValueError, UnicodeDecodeError):
            continue
        assert isinstance(content, dict)
        break
    numbers = re.findall(rb"-?\d[\d.eE+-]*", re.sub(rb'"(?:[^"\\]|\\.)*"?', b"", text))
    for number in numbers:
        mantissa, _, exponent = number.lower().partition(b"e")
        assert len(re.sub(rb"\D", b"", mantissa)) <= (17 if b"." in mantissa else 18)
        assert len(exponent.strip(b"+-")) <= 2


@pytest.mark.promise("A1")
@pytest.mark.parametrize(
    ("begun", "piece", "fits"),
    [
        ('{"b": 1, "', "b", True),
        ('{"b": 1, "b', '"', False),
        ('{"b": 1, "b', '":', False),
        ('{"b": 1, "bc', '"', True),
        ('{"b": {"b', '":', True),  # of another object
        ('{"b": "b', '"', True),  # a value
        ('{"b": ["b', '"', True),
        ('{"b": {"c": 1}, "b', '":', False),
        ('{"": 1, "', '":', False),
        ('{"x\\ny": 1, "x\\u000ay', '"', False),  # another spelling of the key
        ('{"x\\\\": 1, "x\\\\', '"', False),
        ('{"b": ' + "1" * 17, "1", True),
        ('{"b": ' + "1" * 18, "1", False),
        ('{"b": ' + "1" * 18, ",", True),
        ('{"b": ' + "1" * 16, ".", True),
        ('{"b": ' + "1" * 17, ".", False),
        ('{"b": 1.' + "1" * 16, "1", False),
        ('{"b": 1.' + "1" * 15, "1", True),
        ('{"b": 1e1', "1", True),
        ('{"b": 1e-11', "1", False),
    ],
)
def test_what_may_follow(compiler: GrammarCompiler, spellings: list[bytes], begun: str, piece: str, fits: bool) -> None:
    constraint = start(compiler, {"type": "json_object"})
    by_spelling = {spelling: token_id for token_id, spelling in reversed(list(enumerate(spellings)))}
    for byte in begun.encode():
        constraint.accept(by_spelling[bytes([byte])])
    mask = constraint.copy().allowed()
    assert mask is not None
    assert (by_spelling[piece.encode()] in ids_in(mask)) is fits


@pytest.mark.promise("A1")
def test_a_number_that_the_schema_gives_is_written_however_long(
    compiler: GrammarCompiler, spellings: list[bytes]
) -> None:
    value = 1.2345678901234567e-250
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": value}}}
    assert json.loads(written(start(compiler, schema), spellings, seed=0, num_tokens=400)) == pytest.approx(value)
