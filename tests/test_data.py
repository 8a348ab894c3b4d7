"""Dataset formats, bad rows, the held-out split and tokenizing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from training.base_models import EMBEDDED_MODEL, resolve_base_model
from training.chat_format import ChatFormat, Message, load_chat_format
from training.data import (
    IGNORED_LABEL,
    Conversation,
    DataConfig,
    load_conversations,
    split_held_out,
    tokenize,
)
from training.errors import DatasetError

FIXTURES = Path(__file__).parent / "fixtures"
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(scope="module")
def chatml() -> ChatFormat:
    return load_chat_format("chatml", resolve_base_model(EMBEDDED_MODEL))


def _write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _dialog(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = [Message("assistant" if index % 2 else "user", content) for index, content in enumerate(contents)]
    return (*([Message("system", system)] if system else []), *turns)


@pytest.mark.parametrize(
    ("file", "format_name", "expected"),
    [
        (
            "rows_messages.jsonl",
            "messages",
            [
                _dialog("Where does the key hang?", "By the porch.", "Which side?", "The left.", system="Be short."),
                _dialog("What is this?", "A llama."),
            ],
        ),
        (
            "rows_guanaco.jsonl",
            "guanaco",
            [
                _dialog("Where does the key hang?", "By the porch.", "Which side?", "The left."),
                _dialog("Write a heading", "### Llamas\n\nThey hum."),
            ],
        ),
        (
            "rows_prompt_completion.jsonl",
            "prompt_completion",
            [
                _dialog("Where does the key hang?", "By the porch."),
                _dialog("What is this?", "A llama.", system="Be short."),
            ],
        ),
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_each_format_is_read_and_found_by_auto(
    file: str, format_name: Any, expected: list[tuple[Message, ...]], auto: bool
) -> None:
    path = FIXTURES / file
    data = load_conversations(DataConfig(path=str(path), format="auto" if auto else format_name))
    assert [conversation.messages for conversation in data.conversations] == expected
    assert [conversation.source for conversation in data.conversations] == [f"{path}:1", f"{path}:2"]
    assert (data.format, data.num_rows, data.skipped) == (format_name, 2, [])
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_auto_decides_row_by_row_over_several_files() -> None:
    paths = [str(FIXTURES / name) for name in ("rows_messages.jsonl", "rows_guanaco.jsonl")]
    data = load_conversations(DataConfig(path=paths))
    assert data.format == "guanaco, messages"
    assert len(data.conversations) == 4


def test_bom_blank_lines_crlf_and_line_separators_are_no_trouble(tmp_path: Path) -> None:
    row = json.dumps({"text": "### Human: a\u2028b ### Assistant: c"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n  \n{row}".encode())
    data = load_conversations(DataConfig(path=str(tmp_path / "d.jsonl")))
    assert [conversation.messages for conversation in data.conversations] == [_dialog("a\u2028b", "c")] * 2
    assert [conversation.source.rpartition(":")[2] for conversation in data.conversations] == ["1", "4"]


def test_relative_paths_and_max_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    _write(tmp_path / "sub" / "d.jsonl", GOOD, GOOD, "bad but never reached")
    data = load_conversations(DataConfig(path="sub/d.jsonl", max_rows=2))
    assert [conversation.source for conversation in data.conversations] == ["sub/d.jsonl:1", "sub/d.jsonl:2"]
    assert data.num_rows == 2


BAD_ROWS: list[tuple[str, bytes, str]] = [
    ("not json", b'{"messages": [', "is not JSON"),
    ("deep", b"[" * 100_000, "is not JSON"),
    ("not utf-8", b'{"text": "\xff"}', "is not UTF-8"),
    ("a list", b"[1]", "is a JSON list, not an object"),
    ("other shape", b'{"question": "q", "answer": "a"}', "has the keys answer, question"),
    ("sharegpt", b'{"conversations": [{"from": "human", "value": "q"}]}', "has the keys conversations"),
    ("empty dialog", b'{"messages": []}', "messages is empty"),
    ("no assistant", b'{"messages": [{"role": "user", "content": "q"}]}', "last message from the assistant"),
    ("unknown role", b'{"messages": [{"role": "bot", "content": "q"}]}', "messages[0] has role 'bot'"),
    ("role is no text", b'{"messages": [{"role": ["user"], "content": "q"}]}', "messages[0] has role ['user']"),
    ("messages no list", b'{"messages": "hi"}', 'has in messages "hi", expected a list of messages'),
    ("message no object", b'{"messages": ["hi"]}', "has in messages[0]"),
    ("no content", b'{"messages": [{"role": "user", "text": "q"}]}', "has no content in messages[0]"),
    ("content null", b'{"messages": [{"role": "user", "content": null}]}', "has in messages[0].content null"),
    (
        "image",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "has in messages[0].content[0]",
    ),
    (
        "tool call",
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}',
        "calls a tool in messages[0]",
    ),
    (
        "empty answer",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
        "has an empty answer in messages[1]",
    ),
    ("surrogate", b'{"prompt": "\\ud800", "completion": "a"}', "surrogate"),
    ("completion null", b'{"prompt": "q", "completion": null}', "has the keys completion (null), prompt"),
    ("text no string", b'{"text": 1}', "has in text 1, expected a string"),
    ("no turns", b'{"text": "Once upon a time"}', "does not start with '### Human:'"),
    ("preamble", b'{"text": "A chat. ### Human: q ### Assistant: a"}', "does not start with '### Human:'"),
    ("no answer", b'{"text": "### Human: q ### Assistant: a ### Human: q2"}', "last message from the assistant"),
]


@pytest.mark.parametrize(("row", "reason"), [bad[1:] for bad in BAD_ROWS], ids=[bad[0] for bad in BAD_ROWS])
def test_b10_a_bad_row_is_an_error_or_is_skipped_and_listed(tmp_path: Path, row: bytes, reason: str) -> None:
    """P B10: file, line, the row's first characters and the accepted formats; or counted and listed."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + row + b"\n" + json.dumps(GOOD).encode())
    with pytest.raises(DatasetError) as caught:
        load_conversations(DataConfig(path=str(path)))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: the row ")
    assert reason in message
    assert repr(row[:60].decode(errors="replace"))[1:-1] in message
    assert all(key in message for key in ("messages", "### Human:", "completion", "on_bad_row"))
    assert "\n" not in message
    data = load_conversations(DataConfig(path=str(path), on_bad_row="skip"))
    assert (data.num_rows, len(data.conversations)) == (3, 2)
    [skipped] = data.skipped
    assert skipped.source == f"{path}:2"
    assert reason in skipped.reason
    assert row.decode(errors="replace").startswith(skipped.excerpt)


def test_b10_a_row_of_another_format_than_the_configured_one_is_bad(tmp_path: Path) -> None:
    """P B10."""
    with pytest.raises(DatasetError, match="is not of format 'guanaco': it has the keys messages"):
        load_conversations(DataConfig(path=_write(tmp_path / "d.jsonl", GOOD), format="guanaco"))


def test_b10_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    """P B10."""
    with pytest.raises(DatasetError, match=r"no usable row \(1 read, 1 skipped\)"):
        load_conversations(DataConfig(path=_write(tmp_path / "d.jsonl", {"a": 1}), on_bad_row="skip"))
    with pytest.raises(DatasetError, match=r"no usable row \(0 read, 0 skipped\)"):
        load_conversations(DataConfig(path=_write(tmp_path / "empty.jsonl")))


def test_b10_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P B10."""
    monkeypatch.chdir(tmp_path)
    for path in ("nowhere/d.jsonl", "nowhere"):
        with pytest.raises(DatasetError, match=f"dataset '{path}' is no file"):
            load_conversations(DataConfig(path=path))


def test_rows_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a directory named like a hub id as it reads the hub's copy."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    _write(tmp_path / "owner" / "name" / "train.jsonl", {"prompt": "q", "completion": "a"}, GOOD | {"prompt": "q"})
    config = DataConfig(path="owner/name", on_bad_row="skip")
    data = load_conversations(config)
    assert data.conversations[0] == Conversation(_dialog("q", "a"), "owner/name:1")
    assert (data.format, data.num_rows) == ("messages, prompt_completion", 2)
    assert load_conversations(config).sha256 == data.sha256
    with pytest.raises(DatasetError, match="hub dataset 'owner/name', split 'validation', cannot be loaded"):
        load_conversations(config.model_copy(update={"split": "validation"}))


@pytest.mark.parametrize(
    "values",
    [
        {"path": "a.jsonl", "heldout": 0.1},
        {"path": "a.jsonl", "held_out": 0.6},
        {"path": "a.jsonl", "on_bad_row": "ignore"},
        {"path": "a.jsonl", "max_rows": 0},
        {"path": []},
        {"path": ""},
        {},
    ],
)
def test_b11_data_config_is_closed(values: dict[str, Any]) -> None:
    """P B11."""
    with pytest.raises(ValidationError):
        DataConfig.model_validate(values)


def _conversations(num: int) -> list[Conversation]:
    return [Conversation(_dialog(f"question {index}", "answer"), f"d.jsonl:{index}") for index in range(num)]


@pytest.mark.parametrize(("num", "held_out"), [(200, 20), (101, 10), (11, 1), (2, 1)])
def test_held_out_is_the_asked_share_and_deterministic(num: int, held_out: int) -> None:
    conversations = _conversations(num)
    train, held = split_held_out(conversations, 0.1, seed=1)
    assert (len(train), len(held)) == (num - held_out, held_out)
    assert sorted(train + held, key=conversations.index) == conversations
    assert split_held_out(conversations, 0.1, seed=1) == (train, held)
    reordered_train, reordered_held = split_held_out(conversations[::-1], 0.1, seed=1)
    assert (reordered_train[::-1], reordered_held[::-1]) == (train, held)


def test_held_out_depends_on_the_seed() -> None:
    conversations = _conversations(200)
    assert split_held_out(conversations, 0.1, seed=1) != split_held_out(conversations, 0.1, seed=2)


def test_conversations_with_the_same_question_stay_on_one_side() -> None:
    """No held-out question was trained on, whatever its system prompt, its answer or its later turns."""
    conversations = [
        Conversation(
            _dialog(f"question {index % 40}", f"answer {index}", system="S" if index % 3 else None), str(index)
        )
        for index in range(200)
    ]
    train, held_out = split_held_out(conversations, 0.1, seed=0)
    questions = [{m.content for c in side for m in c.messages if m.role == "user"} for side in (train, held_out)]
    assert questions[0].isdisjoint(questions[1])
    assert len(held_out) == 20


def test_split_without_held_out_rows_or_without_two_different_ones() -> None:
    assert split_held_out(_conversations(3), 0, seed=0) == (_conversations(3), [])
    same = [Conversation(_dialog("q", str(index)), str(index)) for index in range(5)]
    with pytest.raises(DatasetError, match="5 conversations with 1 different first user messages"):
        split_held_out(same, 0.1, seed=0)
    train, held_out = split_held_out([*same, Conversation(_dialog("other", "a"), "5")], 0.1, seed=0)
    assert (len(train), len(held_out)) == (5, 1)


def test_e5_labels_are_the_ids_under_the_mask(chatml: ChatFormat) -> None:
    """P E5."""
    conversation = Conversation(_dialog("q", "a", "q2", "a2"), "d.jsonl:1")
    [row] = tokenize([conversation], chatml, max_length=100).rows
    rendered = chatml.render_training(conversation.messages)
    assert row["input_ids"] == rendered.input_ids
    expected = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    assert row["labels"] == [i if trained else IGNORED_LABEL for i, trained in expected]


def test_b10_a_row_that_is_too_long_is_never_cut(chatml: ChatFormat) -> None:
    """P B10: an error with file, line and both numbers, or skipped and listed."""
    short, long = _conversations(1)[0], Conversation(_dialog("word " * 50, "a"), "d.jsonl:7")
    length = len(chatml.render_training(long.messages).input_ids)
    assert len(tokenize([short, long], chatml, max_length=length).rows) == 2
    too_long = rf"d.jsonl:7: the row is too long, {length} tokens with max_length {length - 1}; it starts with 'word "
    with pytest.raises(DatasetError, match=too_long):
        tokenize([short, long], chatml, max_length=length - 1)
    tokenized = tokenize([short, long], chatml, max_length=length - 1, on_bad_row="skip")
    assert [row["input_ids"] for row in tokenized.rows] == [chatml.render_training(short.messages).input_ids]
    assert [row.source for row in tokenized.skipped] == ["d.jsonl:7"]
    with pytest.raises(DatasetError, match=r"all 1 conversations were skipped.*d.jsonl:7 is too long"):
        tokenize([long], chatml, max_length=3, on_bad_row="skip")


def test_b10_a_row_that_the_format_cannot_render_is_bad(chatml: ChatFormat) -> None:
    """P B10."""
    bad = Conversation(_dialog("\x16", "a"), "d.jsonl:3")
    with pytest.raises(DatasetError, match=r"d.jsonl:3: the row is no dialog.*U\+0016"):
        tokenize([bad, *_conversations(1)], chatml, max_length=100)
    assert len(tokenize([bad, *_conversations(1)], chatml, max_length=100, on_bad_row="skip").rows) == 1
