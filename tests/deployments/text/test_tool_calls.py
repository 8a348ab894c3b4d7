"""Calls are found in an answer's text (F2), in whatever pieces it comes."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.text.tool_calls import CallArguments, CallFormat, CallScanner, CallStart
from training.chat.messages import ToolCall
from training.chat.tools import HERMES, LLAMA_3_JSON, CallSyntax

NAMES = ("get", "get_weather")
ARGUMENTS = ("{}", '{"a": 1}', '{"a": "}<tool_call>{\\"", "b": [1, {"c": {}}]}', '{"a": "\\\\"}')
syntaxes = pytest.mark.parametrize("syntax", [HERMES, LLAMA_3_JSON], ids=["hermes", "llama-3"])
calls = st.lists(st.builds(ToolCall, st.sampled_from(NAMES), st.sampled_from(ARGUMENTS)), max_size=3)
texts = st.sampled_from(
    ["", "x", "hi <b> {x}", "ends with <tool", 'or {"name', "two\n\nlines", '{"name": "other", "a"']
)


def written(syntax: CallSyntax, called: list[ToolCall]) -> str:
    return syntax.separator.join(f"{syntax.begin_tag}{syntax.body(call)}{syntax.end_tag}" for call in called)


def scan(scanner: CallScanner, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    text = ""
    found: list[list[str]] = []
    for part in [*(part for piece in pieces for part in scanner.push(piece)), scanner.flush()]:
        if isinstance(part, CallStart):
            found.append([part.name, ""])
        elif isinstance(part, CallArguments):
            found[-1][1] += part.text
        else:
            text += part
    return text, [(name, arguments) for name, arguments in found]


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@pytest.mark.promise("F2")
@syntaxes
@given(text=texts, called=calls, cuts=st.lists(st.integers(0, 10**6), max_size=12))
def test_text_and_calls_are_what_was_written(
    syntax: CallSyntax, text: str, called: list[ToolCall], cuts: list[int]
) -> None:
    answer = text + ("\n" if text and called else "") + written(syntax, called)
    found = scan(CallScanner(CallFormat(syntax, NAMES)), pieces_of(answer, cuts))
    assert found == (text, [(call.name, call.arguments) for call in called])


@pytest.mark.promise("F2")
@syntaxes
def test_a_call_that_is_cut_off_leaves_nothing_in_the_text(syntax: CallSyntax) -> None:
    call = ToolCall("get_weather", '{"city": "Rome"}')
    answer = written(syntax, [call])
    opening = answer.index("get_weather") + len("get_weather" + syntax.middle)
    for length in range(len(syntax.trigger), len(answer)):
        text, found = scan(CallScanner(CallFormat(syntax, NAMES)), ["ok\n", *answer[:length]])
        assert text == "ok"
        assert found == ([] if length < opening else [("get_weather", call.arguments[: length - opening])])


@pytest.mark.promise("F2")
@syntaxes
def test_json_that_resembles_a_call_is_text_where_calls_come_first(syntax: CallSyntax) -> None:
    call = written(syntax, [ToolCall("get", "{}")])
    first_only: Any = CallFormat(syntax, NAMES, only_first=True)
    content = f'{{"a": "{call}"}}'
    assert scan(CallScanner(first_only), [*content]) == (content, [])
    assert scan(CallScanner(first_only), [*call]) == ("", [("get", "{}")])


def test_a_copy_goes_its_own_way() -> None:
    scanner = CallScanner(CallFormat(HERMES, NAMES))
    assert [*scanner.push("<tool_call>\n{")] == []
    other = scanner.copy()
    assert [*scanner.push('"name": "get", "arguments": {}')] == [CallStart("get"), CallArguments("{}")]
    assert (other.num_calls, scanner.num_calls) == (0, 1)
    assert [*other.push("nothing")] == ["<tool_call>\n{nothing"]
