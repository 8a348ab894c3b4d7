"""How each dataset format is parsed, and the error for a row that matches none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training.chat.messages import Message
from training.config.data_config import DataConfig, RowKind
from training.data.examples import BadRow, Dialog, Example, PreferencePair, TextExample, UnpairedExample
from training.data.formats import parse_row
from training.data.sources import RawRow, read_rows

FIXTURES = Path(__file__).parents[2] / "fixtures"


def dialog(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """Turns of user and assistant, beginning with the user's."""
    turns = [Message("assistant" if index % 2 else "user", content) for index, content in enumerate(contents)]
    return (*([Message("system", system)] if system else []), *turns)


def parse(row: Any, kind: RowKind = "sft", **data: Any) -> tuple[str, Example]:
    [source] = DataConfig(path="d.jsonl", **data).sources
    content = row if isinstance(row, bytes) else json.dumps(row).encode()
    parsed = parse_row(RawRow("d.jsonl:1", content), source, kind)
    return parsed.format, parsed.example


def unused(row: Any, kind: RowKind = "sft", **data: Any) -> set[str]:
    [source] = DataConfig(path="d.jsonl", **data).sources
    return {*parse_row(RawRow("d.jsonl:1", row), source, kind).unused_keys}


@pytest.mark.parametrize(
    ("file", "format_name", "expected"),
    [
        (
            "rows_messages.jsonl",
            "messages",
            [
                dialog("Where does the key hang?", "By the porch.", "Which side?", "The left.", system="Be short."),
                dialog("What is this?", "A llama."),
            ],
        ),
        (
            "rows_guanaco.jsonl",
            "guanaco",
            [
                dialog("Where does the key hang?", "By the porch.", "Which side?", "The left."),
                dialog("Write a heading", "### Llamas\n\nThey hum."),
            ],
        ),
        (
            "rows_prompt_completion.jsonl",
            "prompt_completion",
            [
                dialog("Where does the key hang?", "By the porch."),
                dialog("What is this?", "A llama.", system="Be short."),
            ],
        ),
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_each_format_is_read_and_found_by_auto(
    file: str, format_name: Any, expected: list[tuple[Message, ...]], auto: bool
) -> None:
    path = FIXTURES / file
    [source] = DataConfig(path=str(path), format="auto" if auto else format_name).sources
    rows = [*read_rows(source)]
    parsed = [parse_row(row, source, "sft") for row in rows]
    assert [(row.format, row.example) for row in parsed] == [(format_name, Dialog(m)) for m in expected]
    assert [row.location for row in rows] == [f"{path}:1", f"{path}:2"]


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "format_name", "expected"),
    [
        (SHAREGPT, "sharegpt", dialog("q", "a")),
        (SHAREGPT | {"system": "S"}, "sharegpt", dialog("q", "a", system="S")),
        (SHAREGPT | {"system": ""}, "sharegpt", dialog("q", "a")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "user", "value": "q"},
                    {"from": "Model", "value": "a"},
                ]
            },
            "sharegpt",
            dialog("q", "a", system="S"),
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "sharegpt",
            dialog("q", "a"),
        ),
        ({"instruction": "i", "input": "in", "output": "o"}, "alpaca", dialog("i\nin", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", dialog("i", "o")),
        (
            {"instruction": "i", "output": "o", "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]},
            "alpaca",
            dialog("q1", "a1", "q2", "a2", "i", "o", system="S"),
        ),
        ({"prompt": "q", "completion": "a", "system": "S"}, "prompt_completion", dialog("q", "a", system="S")),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:", "completion": "a2"},
            "prompt_completion",
            dialog("q", "a", "q2", "a2"),
        ),
        (
            {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])},
            "messages",
            dialog("q", "a"),
        ),
    ],
)
def test_other_shapes_of_a_dialog(row: Any, format_name: str, expected: tuple[Message, ...]) -> None:
    assert parse(row) == (format_name, Dialog(expected))


MARKS = [
    ({"weight": 0}, {"weight": 1}),  # OpenAI
    ({"weight": 0.0}, {"weight": None}),  # the same from Parquet
    ({"train": False}, {"train": True}),  # Axolotl
    ({"training": False}, {}),
    ({"weight": 1, "train": False}, {"weight": 1, "train": True}),
]


@pytest.mark.promise("E5")
@pytest.mark.parametrize(("no", "yes"), MARKS)
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_an_answer_that_is_marked_so_is_not_trained(no: Any, yes: Any, names: tuple[str, str, str]) -> None:
    """P E5: OpenAI's `weight` and Axolotl's `train` leave an answer in the dialog, as context."""
    key, role, content = names
    turns = [("user", "q", {}), ("assistant", "bad", no), ("user", "q2", {}), ("assistant", "good", yes)]
    row = {key: [{role: who, content: text, **mark} for who, text, mark in turns]}
    first, bad, *rest = dialog("q", "bad", "q2", "good")
    assert parse(row)[1] == Dialog((first, replace(bad, trained=False), *rest))


@pytest.mark.promise("B10")
@pytest.mark.parametrize(
    ("user", "assistant", "reason"),
    [
        ({}, {"weight": 2}, "messages[1].weight: expected 0 or 1, got 2"),
        ({}, {"weight": 0.5}, "messages[1].weight: expected 0 or 1, got 0.5"),
        ({}, {"weight": "0"}, 'messages[1].weight: expected 0 or 1, got "0"'),
        ({}, {"train": "no"}, 'messages[1].train: expected true or false, got "no"'),
        ({"weight": 1}, {}, "messages[0].weight: only assistant messages can be trained, got 1"),
        ({"train": True}, {}, "messages[0].train: only assistant messages can be trained, got true"),
        ({"train": False}, {"weight": 0}, "nothing to train on: every answer is marked as untrained"),
        ({}, {"train_detail": [{"begin_offset": 0}]}, "messages[1]: train_detail is not supported"),
    ],
)
def test_a_mark_that_cannot_be_kept_is_a_bad_row(user: Any, assistant: Any, reason: str) -> None:
    """P B10."""
    turns = [{"role": "user", "content": "q"} | user, {"role": "assistant", "content": "a"} | assistant]
    with pytest.raises(BadRow) as exc_info:
        parse({"messages": turns})
    assert reason in str(exc_info.value)


@pytest.mark.promise("B10")
def test_an_answer_that_is_judged_is_learned() -> None:
    """P B10: a comparison of answers that are not to be trained teaches nothing; earlier turns are context anyway."""
    turns = [{"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "q2"}]
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "q"}, *turns], "rejected": "bad"}
    assert isinstance(parse(row | {"chosen": "good"}, "preference")[1], PreferencePair)
    judged: dict[str, RowKind] = {"chosen": "preference", "completion": "unpaired_preference"}
    for key, kind in judged.items():
        with pytest.raises(BadRow, match="the answer to be rated is marked as untrained"):
            parse(row | {key: [turns[0]], "label": True}, kind)


def test_a_plain_text_is_trained_only_where_it_is_asked_for() -> None:
    assert parse({"text": "Once upon a time"}, format="text") == ("text", TextExample("Once upon a time"))
    assert parse({"text": "### Human: q ### Assistant: a"}, format="text")[0] == "text"
    with pytest.raises(BadRow, match=r"set data\.format to text"):
        parse({"text": "Once upon a time"})
    with pytest.raises(BadRow, match="text: empty"):
        parse({"text": " "}, format="text")


def test_columns_name_the_parts_of_any_row() -> None:
    row = {"question": "q", "answer": "a", "prompt": "not this", "tone": "S"}
    columns = {"prompt": "question", "completion": "answer", "system": "tone"}
    assert parse(row, columns=columns) == ("prompt_completion", Dialog(dialog("q", "a", system="S")))
    with pytest.raises(BadRow, match=r"no key 'question', which data.columns names: the row has the keys answer"):
        parse({"answer": "a"}, columns=columns)


@pytest.mark.parametrize(
    ("row", "columns", "format_name", "expected"),
    [
        (
            {"question": "q", "answer": "a", "system": "S"},
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
            dialog("q", "a", system="S"),
        ),
        ({"instruction": "i", "response": "o"}, {"output": "response"}, "alpaca", dialog("i", "o")),
        (
            {"instruction": "i", "input": "in", "response": "o"},
            {"instruction": "instruction", "output": "response"},
            "alpaca",
            dialog("i\nin", "o"),
        ),
        (  # what is named goes before a format that the row has by itself
            {"messages": [{"role": "user", "content": "x"}], "instruction": "x", "output": "x", "q": "q", "a": "a"},
            {"prompt": "q", "completion": "a"},
            "prompt_completion",
            dialog("q", "a"),
        ),
        (  # two names that change places
            {"instruction": "in", "input": "i", "output": "o"},
            {"instruction": "input", "input": "instruction"},
            "alpaca",
            dialog("i\nin", "o"),
        ),
    ],
)
def test_columns_rename_and_leave_the_rest_of_a_row(
    row: Any, columns: Any, format_name: str, expected: tuple[Message, ...]
) -> None:
    assert parse(row, columns=columns) == (format_name, Dialog(expected))


def test_the_prompt_that_columns_name_is_the_prompt() -> None:
    row = {"prompt": "not this", "question": "q", "chosen": "good", "rejected": "bad"}
    assert parse(row, "preference", columns={"instruction": "question"}) == ("preference", PAIR)


@pytest.mark.parametrize(
    ("row", "kind", "columns", "expected"),
    [
        (SHAREGPT | {"system": "S", "id": 7, "tools": [], "meta": {}, "tag": None, "note": ""}, "sft", {}, {"id"}),
        ({"instruction": "i", "input": "", "output": "o", "history": [], "score": 0}, "sft", {}, {"score"}),
        ({"prompt": "q", "completion": "a", "input": "in", "messages": None}, "sft", {}, {"input"}),
        ({"text": "### Human: q ### Assistant: a", "system": "S", "prompt": "x"}, "sft", {}, {"prompt"}),
        (
            {
                "messages": [
                    {"role": "user", "content": "q", "name": "Ann"},
                    {"role": "assistant", "content": "a", "weight": 1, "refusal": None, "tool_calls": []},
                ],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            "sft",
            {},
            {"messages[].name"},
        ),
        (
            {"question": "q", "answer": "a", "prompt": "not this", "instruction": "nor this", "tone": "S", "id": 1},
            "sft",
            {"prompt": "question", "completion": "answer", "system": "tone"},
            {"prompt", "instruction", "id"},
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "instruction": "i"}, "preference", {}, {"instruction"}),
        ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "x": 1}, "preference", {}, {"x"}),
        ({"prompt": "q", "completion": "a", "label": True, "chosen": "c"}, "unpaired_preference", {}, {"chosen"}),
    ],
)
def test_keys_that_say_nothing_to_a_format_are_told(row: Any, kind: RowKind, columns: Any, expected: set[str]) -> None:
    """Under the row's own names; a key without a value is none."""
    assert unused(row, kind, columns=columns) == expected


PAIR = PreferencePair(dialog("q"), Message("assistant", "good"), Message("assistant", "bad"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {  # UltraFeedback
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},  # HH
        {  # LLaMA-Factory's ShareGPT pairs
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
    ],
)
def test_every_shape_of_a_preference(row: Any) -> None:
    assert parse(row, "preference") == ("preference", PAIR)


def test_preferences_share_whole_turns() -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "q2"))]
    row = {key: [*turns, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    assert parse(row, "preference")[1] == PreferencePair(
        dialog("q", "a", "q2"), Message("assistant", "chosen"), Message("assistant", "rejected")
    )


@pytest.mark.promise("B10")
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: the answer is empty"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "messages[1]: the answer is empty"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: the row has the keys chosen, rejected"),
        (
            {"prompt": "q", "completion": "a"},
            "does not match format 'preference': the row has the keys completion, ",
        ),
        (
            {
                "prompt": "other",
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
            },
            "prompt: not in the dialogs",
        ),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
            },
            "chosen: expected one answer at the end, got 2 messages",
        ),
    ],
)
def test_a_bad_preference_row(row: Any, reason: str) -> None:
    """P B10."""
    with pytest.raises(BadRow) as exc_info:
        parse(row, "preference")
    assert reason in str(exc_info.value)


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (False, False), (1, True), (0, False), ("true", True), (" False ", False)]
)
def test_rated_answers(label: Any, expected: bool) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    rated = UnpairedExample(dialog("q"), Message("assistant", "a"), expected)
    assert parse(row, "unpaired_preference") == ("unpaired_preference", rated)


@pytest.mark.promise("B10")
def test_a_label_must_be_one() -> None:
    """P B10."""
    with pytest.raises(BadRow, match='label: expected true or false, got "good"'):
        parse({"prompt": "q", "completion": "a", "label": "good"}, "unpaired_preference")


@pytest.mark.promise("B10")
def test_supervised_training_does_not_learn_the_worse_answer() -> None:
    """P B10: rows for DPO and KTO are distinguished from those for SFT."""
    with pytest.raises(BadRow, match="set method: dpo"):
        parse({"prompt": "q", "chosen": "a", "rejected": "b"})


@pytest.mark.promise("B10")
@pytest.mark.parametrize("label", [False, True, 0, 1, 0.0, "false", " True", "0", "1"])
def test_every_label_that_kto_reads_is_refused_by_sft(label: Any) -> None:
    """P B10: what one method takes for a bad answer must not be learned by the other."""
    row = {"prompt": "q", "completion": "a", "label": label}
    assert isinstance(parse(row, "unpaired_preference")[1], UnpairedExample)
    with pytest.raises(BadRow, match=r"the answer is labelled .*set method: kto"):
        parse(row)
    assert parse(row, format="prompt_completion")[1] == Dialog(dialog("q", "a"))
    assert unused(row, format="prompt_completion") == {"label"}


@pytest.mark.parametrize("label", [None, "", 2, -1, "sports", ["x"]])
def test_a_label_that_kto_cannot_read_is_a_column_like_any_other(label: Any) -> None:
    assert parse({"prompt": "q", "completion": "a", "label": label})[1] == Dialog(dialog("q", "a"))
