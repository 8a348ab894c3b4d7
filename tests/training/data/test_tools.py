"""Rows with tools, calls and results (F2), in the forms that people have them in."""

import json
from typing import Any

import pytest

from tests.training.data.test_formats import parse, unused
from training.chat.messages import Message, ToolCall
from training.chat.tools import tool_json
from training.data.examples import BadRow, Dialog, PreferencePair

PRICE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "price", "parameters": {"type": "object", "properties": {"loaf": {"type": "integer"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "price", "arguments": '{"loaf": 3}'}}
QUESTION = {"role": "user", "content": "What does loaf 3 cost?"}
ANSWERED = [{"role": "tool", "tool_call_id": "c1", "content": "3 crowns"}, {"role": "assistant", "content": "Three."}]
OPENAI = {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, *ANSWERED]}
EXPECTED = Dialog(
    (
        Message("user", QUESTION["content"], tools=(tool_json(PRICE),)),
        Message("assistant", "", tool_calls=(ToolCall("price", '{"loaf": 3}', "c1"),)),
        Message("tool", "3 crowns", tool_call_id="c1"),
        Message("assistant", "Three."),
    )
)


def with_calls(*calls: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", "tool_calls": [*calls]}, *ANSWERED], "tools": [PRICE]}


def without_ids(dialog: Any) -> Any:
    return [(m.role, m.content, m.tools, [(c.name, c.arguments) for c in m.tool_calls]) for m in dialog.messages]


@pytest.mark.promise("F2")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(OPENAI | {"tools": [PRICE]}, id="openai"),
        pytest.param(OPENAI | {"tools": json.dumps([PRICE])}, id="tools as JSON text"),
        pytest.param(OPENAI | {"tools": [PRICE["function"]]}, id="bare functions"),
        pytest.param(OPENAI | {"functions": [PRICE["function"]]}, id="the older name"),
        pytest.param(with_calls({"name": "price", "arguments": {"loaf": 3}}), id="bare call"),
        pytest.param(with_calls(CALL | {"function": {"name": "price", "arguments": {"loaf": 3}}}), id="object"),
        pytest.param(
            {
                "messages": [
                    QUESTION,
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "price", "arguments": '{"loaf":3}'},
                    },
                    {"role": "function", "name": "price", "content": "3 crowns"},
                    ANSWERED[1],
                ],
                "functions": [PRICE["function"]],
            },
            id="openai's older form",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": QUESTION["content"]},
                    {"from": "function_call", "value": '{"name": "price", "arguments": {"loaf": 3}}'},
                    {"from": "observation", "value": "3 crowns"},
                    {"from": "gpt", "value": "Three."},
                ],
                "tools": json.dumps([PRICE["function"]]),
            },
            id="sharegpt",
        ),
    ],
)
def test_a_row_with_calls_is_read(row: Any) -> None:
    dialog = parse(row)[1]
    assert without_ids(dialog) == without_ids(EXPECTED)
    assert unused(row) <= {"messages[].name"}


@pytest.mark.promise("F2")
def test_ids_pair_results_with_calls() -> None:
    assert parse(OPENAI | {"tools": [PRICE]})[1] == EXPECTED


@pytest.mark.promise("F2")
def test_several_calls_of_one_turn() -> None:
    calls = [{"name": "price", "arguments": {"loaf": number}} for number in (1, 2)]
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(calls)}]
    dialog: Any = parse({"conversations": turns, "tools": "[]"})[1]
    assert [call.arguments for call in dialog.messages[-1].tool_calls] == ['{"loaf": 1}', '{"loaf": 2}']
    assert dialog.messages[0].tools == ()


@pytest.mark.promise("F2")
def test_calls_can_be_preferred() -> None:
    good, bad = {"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "Three, I guess."}
    pair: Any = parse({"prompt": [QUESTION], "chosen": [good], "rejected": [bad], "tools": [PRICE]}, "preference")[1]
    assert isinstance(pair, PreferencePair)
    assert pair.prompt[0].tools == (tool_json(PRICE),)
    assert (pair.chosen.tool_calls[0].name, pair.rejected.tool_calls) == ("price", ())


@pytest.mark.promise("F2", "B5")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (OPENAI | {"tools": [{"type": "function"}]}, "tools[0]: expected"),
        (OPENAI | {"tools": "price"}, "tools: not valid JSON"),
        (OPENAI | {"tools": {"name": "price"}}, "tools: expected a list"),
        (OPENAI | {"tools": [PRICE, PRICE]}, "tools: two tools are named 'price'"),
        (OPENAI | {"tools": [{"name": "two words"}]}, "tools[0]: the name 'two words' has other characters"),
        (OPENAI | {"tools": [{"name": "other"}]}, "messages[1]: calls 'price', but the row's tools are other"),
        (with_calls({"name": "price", "arguments": '{"loaf'}), "tool_calls[0].arguments: not valid JSON"),
        (with_calls({"name": "price", "arguments": "[1]"}), "tool_calls[0].arguments: expected a JSON object"),
        (with_calls("price"), "tool_calls[0]: expected a call"),
        ({"messages": [QUESTION | {"tool_calls": [CALL]}, ANSWERED[1]]}, "messages[0]: only the assistant calls tools"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "messages[1]: content missing"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "price()"}]},
            "conversations[1].value: not valid JSON",
        ),
    ],
)
def test_what_is_no_tool_and_no_call_is_refused_at_its_place(row: Any, words: str) -> None:
    with pytest.raises(BadRow) as exc_info:
        parse(row)
    assert words in str(exc_info.value)
