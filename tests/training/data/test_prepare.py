"""A dataset from its files to a run's rows: bad rows, lengths, duplicates, the held-out split, weights, the cache."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.repository.import_graph import import_graph, modules
from tests.training.data.test_formats import FIXTURES, dialog
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat
from training.chat.detect import load_chat_format
from training.config.data_config import DataConfig
from training.data import build_store, store_cache
from training.data.prepare import PreparedData, prepare_data
from training.data.row_store import IGNORED_LABEL, PreferenceRow, UnpairedRow
from training.errors import DatasetError
from training.home import corral_home

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

Prepare = Callable[..., PreparedData]


@pytest.fixture(scope="module")
def chatml(tiny_base: BaseCheckpoint) -> ChatFormat:
    return load_chat_format("chatml", tiny_base)


@pytest.fixture(scope="module")
def prepare(tiny_base: BaseCheckpoint, chatml: ChatFormat) -> Prepare:
    tokenizer = load_tokenizer(tiny_base)

    def prepared(path: Any, max_length: int = 200, seed: int = 0, kind: Any = "sft", **values: Any) -> PreparedData:
        config = DataConfig(path=path, **{"held_out": 0, **values})
        return prepare_data(config, tiny_base, chatml, tokenizer, max_length=max_length, seed=seed, kind=kind)

    return prepared


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(question: str, answer: str = "answer", **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


def questions(num: int) -> list[dict[str, Any]]:
    return [row(f"question {index}") for index in range(num)]


def questions_of(prepared: PreparedData, side: str = "train") -> list[str]:
    """The first user message of every row of a side, in order."""
    rows = getattr(prepared, side)
    conversations = [rows.conversation(at) for at in range(len(rows))]
    return [next(m.content for m in c.messages if m.role == "user") for c in conversations]


@pytest.mark.parametrize("file", ["rows_messages.jsonl", "rows_guanaco.jsonl", "rows_prompt_completion.jsonl"])
def test_what_is_recorded_of_a_file(prepare: Prepare, file: str) -> None:
    path = FIXTURES / file
    report = prepare(str(path)).report
    expected = file.removeprefix("rows_").removesuffix(".jsonl")
    assert (report.formats, report.num_rows_read, report.skipped) == ({expected: 2}, 2, [])
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_auto_decides_row_by_row_over_several_files(prepare: Prepare) -> None:
    paths = [str(FIXTURES / name) for name in ("rows_messages.jsonl", "rows_guanaco.jsonl")]
    prepared = prepare(paths)
    assert prepared.report.formats == {"messages": 2, "guanaco": 2}
    assert len(prepared.train) == 4
    content = b"".join(Path(path).read_bytes() for path in paths)
    assert prepared.report.sha256 == hashlib.sha256(content).hexdigest()


def test_bom_blank_lines_crlf_and_line_separators_are_no_trouble(prepare: Prepare, tmp_path: Path) -> None:
    line = json.dumps({"text": "### Human: a\u2028b ### Assistant: c"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \n{line}".encode())
    train = prepare(str(tmp_path / "d.jsonl"), deduplicate=False).train
    conversations = [train.conversation(at) for at in range(len(train))]
    assert [c.messages for c in conversations if c] == [dialog("a\u2028b", "c")] * 2
    assert [c.source.rpartition(":")[2] for c in conversations if c] == ["1", "4"]


def test_relative_paths_and_max_rows(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "d.jsonl", GOOD, GOOD, "bad but never reached")
    prepared = prepare("sub/d.jsonl", max_rows=2, deduplicate=False)
    assert [prepared.train.conversation(at).source for at in range(2)] == ["sub/d.jsonl:1", "sub/d.jsonl:2"]
    assert prepared.report.num_rows_read == 2


@pytest.mark.parametrize(
    ("max_rows", "expected"), [(7, [2, 3, 2]), (9, [2, 4, 3]), (10, [2, 4, 4]), (2, [0, 1, 1]), (99, [2, 6, 5])]
)
def test_max_rows_are_shared_by_the_sources(
    prepare: Prepare, tmp_path: Path, max_rows: int, expected: list[int]
) -> None:
    """Equally, as far as they have rows; sources that are only evaluated do not count."""
    sizes = {"a": 2, "b": 6, "c": 5}
    paths = [write(tmp_path / f"{n}.jsonl", *(row(f"{n} {i}") for i in range(size))) for n, size in sizes.items()]
    held_out = write(tmp_path / "h.jsonl", *(row(f"h {i}") for i in range(3)))
    prepared = prepare(paths, max_rows=max_rows, held_out_path=held_out)
    assert [source.num_rows_read for source in prepared.report.sources] == [*expected, 3]


BAD_ROWS: list[tuple[str, bytes, str]] = [
    ("not json", b'{"messages": [', "not valid JSON"),
    ("deep", b"[" * 100_000, "not valid JSON"),
    ("not utf-8", b'{"text": "\xff"}', "not valid UTF-8"),
    ("a list", b"[1]", "expected a JSON object, got list"),
    ("other shape", b'{"question": "q", "answer": "a"}', "has the keys answer, question"),
    ("sharegpt", b'{"conversations": [{"from": "human", "value": "q"}]}', "last message from the assistant"),
    ("sharegpt role", b'{"conversations": [{"from": "observation", "value": "q"}]}', "has role 'observation'"),
    ("sharegpt keys", b'{"conversations": [{"from": "human", "text": "q"}]}', "conversations[0]: value missing"),
    ("alpaca output", b'{"instruction": "i", "output": 3}', "output: expected a string, got 3"),
    (
        "history",
        b'{"instruction": "i", "output": "o", "history": ["q"]}',
        "history: expected a list of [question, ",
    ),
    ("empty dialog", b'{"messages": []}', "messages is empty"),
    ("no assistant", b'{"messages": [{"role": "user", "content": "q"}]}', "last message from the assistant"),
    ("unknown role", b'{"messages": [{"role": "bot", "content": "q"}]}', "messages[0] has role 'bot'"),
    ("role is no text", b'{"messages": [{"role": ["user"], "content": "q"}]}', "messages[0] has role ['user']"),
    ("messages no list", b'{"messages": "hi"}', 'messages: expected a list of messages, got "hi"'),
    ("message no object", b'{"messages": ["hi"]}', "messages[0]: expected an object with"),
    ("no content", b'{"messages": [{"role": "user", "text": "q"}]}', "messages[0]: content missing"),
    ("content null", b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content: expected"),
    (
        "image",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "messages[0].content[0]: expected a part",
    ),
    (
        "tool call",
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}',
        "messages[0]: tool calls are not supported",
    ),
    (
        "empty answer",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
        "messages[1]: the answer is empty",
    ),
    ("surrogate", b'{"prompt": "\\ud800", "completion": "a"}', "surrogate"),
    ("completion null", b'{"prompt": "q", "completion": null}', "has the keys completion (null), prompt"),
    ("text no string", b'{"text": 1}', "text: expected a string, got 1"),
    ("no turns", b'{"text": "Once upon a time"}', "does not start with '### Human:'"),
    ("preamble", b'{"text": "A chat. ### Human: q ### Assistant: a"}', "does not start with '### Human:'"),
    ("no answer", b'{"text": "### Human: q ### Assistant: a ### Human: q2"}', "last message from the assistant"),
]


@pytest.mark.promise("B10")
@pytest.mark.parametrize(("line", "reason"), [bad[1:] for bad in BAD_ROWS], ids=[bad[0] for bad in BAD_ROWS])
def test_a_bad_row_is_an_error_or_is_skipped_and_listed(
    prepare: Prepare, tmp_path: Path, line: bytes, reason: str
) -> None:
    """P B10: file, line, the row's first characters and the accepted formats; or counted and listed."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(row("other")).encode())
    with pytest.raises(DatasetError) as exc_info:
        prepare(str(path))
    message = str(exc_info.value)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert repr(line[:60].decode(errors="replace"))[1:-1] in message
    accepted = ("messages", "conversations", "instruction", "### Human:", "completion", "on_bad_row")
    assert all(key in message for key in accepted)
    assert "\n" not in message
    prepared = prepare(str(path), on_bad_row="skip")
    assert (prepared.report.num_rows_read, len(prepared.train), prepared.report.num_skipped) == (3, 2, 1)
    [skipped] = prepared.report.skipped
    assert skipped.source == f"{path}:2"
    assert reason in skipped.reason
    assert line.decode(errors="replace").startswith(skipped.excerpt)
    with pytest.raises(DatasetError) as exc_info:  # also where the rows are in the cache already
        prepare(str(path))
    assert str(exc_info.value) == message


@pytest.mark.promise("B10")
def test_a_row_of_another_format_than_the_configured_one_is_bad(prepare: Prepare, tmp_path: Path) -> None:
    """P B10."""
    with pytest.raises(DatasetError, match="does not match format 'guanaco': the row has the keys messages"):
        prepare(write(tmp_path / "d.jsonl", GOOD), format="guanaco")


@pytest.mark.promise("B10")
def test_a_format_that_the_method_cannot_use_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    """P B10."""
    with pytest.raises(DatasetError, match=r"has format 'preference', but the method trains on sft rows"):
        prepare(write(tmp_path / "d.jsonl", GOOD), format="preference")


@pytest.mark.promise("B10")
@pytest.mark.parametrize(("suffix", "label"), [("jsonl", "0"), ("csv", "false"), ("csv", "1")])
def test_a_set_for_kto_is_no_set_for_sft(prepare: Prepare, tmp_path: Path, suffix: str, label: str) -> None:
    """P B10: one line that names the method, whatever file the labels are in."""
    path = tmp_path / f"d.{suffix}"
    csv_text = f"prompt,completion,label\nq,a,{label}\n"
    path.write_text(csv_text if suffix == "csv" else f'{{"prompt": "q", "completion": "a", "label": {label}}}\n')
    with pytest.raises(DatasetError, match=r"the answer is labelled \(label\).*set method: kto") as exc_info:
        prepare(str(path))
    assert "\n" not in str(exc_info.value)
    assert len(prepare(str(path), kind="unpaired_preference").train) == 1


@pytest.mark.promise("B10")
def test_nothing_usable_is_an_error_even_when_skipping(prepare: Prepare, tmp_path: Path) -> None:
    """P B10."""
    with pytest.raises(DatasetError, match=r"no usable row \(1 read, 1 skipped; first: .*d.jsonl:1: does not"):
        prepare(write(tmp_path / "d.jsonl", {"a": 1}), on_bad_row="skip")
    with pytest.raises(DatasetError, match=r"no usable row \(0 read, 0 skipped\)"):
        prepare(write(tmp_path / "empty.jsonl"))


@pytest.mark.promise("B10")
def test_a_missing_file_is_named(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P B10."""
    monkeypatch.chdir(tmp_path)
    for path in ("nowhere/d.jsonl", "nowhere", "nowhere/d.csv.gz", "*.jsonl"):
        with pytest.raises(
            DatasetError, match=f"dataset '{path.replace('*', '.')}' (is neither|is not of a|has no file)"
        ):
            prepare(path)


@pytest.mark.promise("B11")
@pytest.mark.parametrize(
    "values",
    [
        {"path": "a.jsonl", "heldout": 0.1},
        {"path": "a.jsonl", "held_out": 0.6},
        {"path": "a.jsonl", "held_out": 1.5},
        {"path": "a.jsonl", "held_out": -1},
        {"path": "a.jsonl", "held_out": True},
        {"path": "a.jsonl", "on_bad_row": "ignore"},
        {"path": "a.jsonl", "on_too_long": "cut"},
        {"path": "a.jsonl", "max_rows": 0},
        {"path": "a.jsonl", "columns": {"question": "q"}},
        {"path": ["a.jsonl", {"path": "b.jsonl", "wieght": 2}]},
        {"path": {"path": "b.jsonl", "weight": 0}},
        {"path": "a.jsonl", "held_out_path": {"path": "b.jsonl", "weight": 2}},
        {"path": [7]},
        {"path": []},
        {"path": ""},
        {},
    ],
)
def test_data_config_is_closed(values: dict[str, Any]) -> None:
    """P B11."""
    with pytest.raises(ValidationError):
        DataConfig.model_validate(values)


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", GOOD)
    config = DataConfig(path=["a.jsonl", {"path": "sub/*.csv", "weight": 2}, "owner/name"], held_out_path="a.jsonl")
    absolute = config.with_absolute_paths()
    assert absolute.paths == [f"{tmp_path}/a.jsonl", f"{tmp_path}/sub/*.csv", "owner/name"]
    assert absolute.path[1].weight == 2
    assert absolute.held_out_path[0].path == f"{tmp_path}/a.jsonl"
    assert DataConfig.model_validate(absolute.model_dump(mode="json")) == absolute


@pytest.mark.promise("E5")
def test_labels_are_the_ids_under_the_mask(prepare: Prepare, chatml: ChatFormat, tmp_path: Path) -> None:
    """P E5."""
    messages = dialog("q", "a", "q2", "a2")
    turns = [{"role": m.role, "content": m.content} for m in messages]
    prepared = prepare(write(tmp_path / "d.jsonl", {"messages": turns}))
    [tokenized] = prepared.train
    rendered = chatml.render_training(messages)
    assert tokenized["input_ids"] == rendered.input_ids
    expected = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    assert tokenized["labels"] == [i if trained else IGNORED_LABEL for i, trained in expected]
    assert prepared.train.lengths.tolist() == [len(rendered.input_ids)]
    assert prepared.train.num_trained_tokens == sum(rendered.loss_mask) == prepared.report.num_trained_tokens


@pytest.mark.promise("E5")
def test_an_untrained_answer_has_no_labels_and_no_colour(prepare: Prepare, tmp_path: Path) -> None:
    """P E5: it is present as context, in the tokens, the report's rows and what a sample asks about."""
    marked = [
        {"role": m.role, "content": m.content, **({"weight": 0} if m.content == "bad answer" else {})}
        for m in dialog("q", "bad answer", "q2", "good answer")
    ]
    path = write(tmp_path / "d.jsonl", {"messages": marked})
    prepared = prepare(path)
    [segments] = prepared.report.samples
    assert [s.text for s in segments if s.role == "trained"] == ["good answer<|im_end|>"]
    assert "bad answer<|im_end|>" in "".join(s.text for s in segments if s.role == "context")
    [tokenized] = prepared.train
    learned = sum(label != IGNORED_LABEL for label in tokenized["labels"])
    assert 0 < learned == prepared.report.num_trained_tokens
    stored = prepared.train.conversation(0)
    assert stored is not None
    assert [m.trained for m in stored.messages] == [True, False, True, True]


@pytest.mark.promise("E5")
def test_rows_that_differ_in_what_is_trained_are_no_duplicates(prepare: Prepare, tmp_path: Path) -> None:
    """P E5."""
    rows = []
    for weight in (0, 1, None, 0):
        turns: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in dialog("q", "a", "q2", "a2")]
        turns[1]["weight"] = weight
        rows.append({"messages": turns})
    report = prepare(write(tmp_path / "d.jsonl", *rows)).report
    assert [note.source.rpartition(":")[2] for note in report.duplicates] == ["3", "4"]


@pytest.mark.promise("E5")
def test_truncation_keeps_up_to_the_last_trained_answer_that_fits(
    prepare: Prepare, chatml: ChatFormat, tmp_path: Path
) -> None:
    """P E5."""
    messages = dialog("q", "untrained", "q2", "trained", "q3", "untrained", "q4", "too long " * 30)
    turns = [
        {"role": m.role, "content": m.content} | ({"weight": 0} if m.content == "untrained" else {}) for m in messages
    ]
    expected = chatml.render_training(messages[:4]).input_ids
    room = len(chatml.render_training(messages[:6]).input_ids)
    path = write(tmp_path / "d.jsonl", {"messages": turns})
    prepared = prepare(path, max_length=room, on_too_long="truncate")
    assert [tokenized["input_ids"] for tokenized in prepared.train] == [expected]


@pytest.mark.promise("E1")
def test_preferences_begin_as_the_prompt_is_served(prepare: Prepare, chatml: ChatFormat, tmp_path: Path) -> None:
    """P E1, E5: a prompt has the ids that serving gives it, an answer those of its text and its end of turn."""
    path = write(tmp_path / "d.jsonl", {"prompt": "What hums?", "chosen": "A llama.", "rejected": "Nobody does."})
    prepared = prepare(path, kind="preference")
    pair: PreferenceRow = prepared.train[0]  # type: ignore[assignment]
    assert pair["prompt_ids"] == chatml.render_prompt(dialog("What hums?"))
    for key, answer in (("chosen_ids", "A llama."), ("rejected_ids", "Nobody does.")):
        rendered = chatml.render_training(dialog("What hums?", answer))
        trained = [i for i, learned in zip(rendered.input_ids, rendered.loss_mask, strict=True) if learned]
        assert pair[key] == trained  # type: ignore[literal-required]
    assert [segment.role for segment in prepared.report.samples[0]] == ["context", "trained", "rejected"]
    rated = write(tmp_path / "k.jsonl", {"prompt": "What hums?", "completion": "A llama.", "label": False})
    unpaired: UnpairedRow = prepare(rated, kind="unpaired_preference").train[0]  # type: ignore[assignment]
    assert unpaired == {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"], "label": False}


def test_a_text_is_trained_whole_and_split_where_it_is_too_long(
    prepare: Prepare, chatml: ChatFormat, tmp_path: Path
) -> None:
    (tmp_path / "story.txt").write_text("The llama hums. " * 40)
    rendered = chatml.render_text("The llama hums. " * 40)
    assert all(rendered.loss_mask)
    prepared = prepare(str(tmp_path / "story.txt"), format="text", max_length=50)
    pieces = [piece["input_ids"] for piece in prepared.train]
    assert [token for piece in pieces for token in piece] == rendered.input_ids
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= 50
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == -(-len(rendered.input_ids) // 50)
    assert prepared.report.num_split == 1
    assert all(piece["labels"] == piece["input_ids"] for piece in [*prepared.train][1:])
    assert prepared.held_out_samples() == []


@pytest.mark.promise("B10")
def test_a_row_that_is_too_long_is_never_cut(prepare: Prepare, chatml: ChatFormat, tmp_path: Path) -> None:
    """P B10: an error with file, line and both numbers, or skipped and listed."""
    path = write(tmp_path / "d.jsonl", row("short"), row("word " * 50, "a"))
    length = len(chatml.render_training(dialog("word " * 50, "a")).input_ids)
    assert len(prepare(path, max_length=length).train) == 2
    too_long = rf"d.jsonl:2: too long: {length} tokens, max_length is {length - 1}; the row starts with '.*word "
    with pytest.raises(DatasetError, match=too_long):
        prepare(path, max_length=length - 1)
    for policy in ({"on_bad_row": "skip"}, {"on_too_long": "skip"}):
        prepared = prepare(path, max_length=length - 1, **policy)
        ids = [tokenized["input_ids"] for tokenized in prepared.train]
        assert ids == [chatml.render_training(dialog("short", "answer")).input_ids]
        assert [note.source for note in prepared.report.too_long] == [f"{path}:2"]
        assert prepared.report.num_too_long == 1
        assert prepared.report.lengths.max == length
    with pytest.raises(DatasetError, match="too long: "):
        prepare(path, max_length=length - 1, on_bad_row="skip", on_too_long="error")
    with pytest.raises(DatasetError, match=r"no usable row \(2 read, 2 skipped; first: .*:1: too long"):
        prepare(path, max_length=8, on_bad_row="skip")


def test_truncation_drops_whole_exchanges_and_says_so(prepare: Prepare, chatml: ChatFormat, tmp_path: Path) -> None:
    messages = dialog("q", "a", "q2", "a2", "q3", "a long answer " * 9, system="S")
    turns = [{"role": m.role, "content": m.content} for m in messages]
    path = write(tmp_path / "d.jsonl", {"messages": turns})
    fits = chatml.render_training(messages[:5])
    num_tokens = len(chatml.render_training(messages).input_ids)
    for max_length in (len(fits.input_ids), num_tokens - 1):
        prepared = prepare(path, max_length=max_length, on_too_long="truncate")
        assert [tokenized["input_ids"] for tokenized in prepared.train] == [fits.input_ids]
        [note] = prepared.report.truncated
        assert (note.source, prepared.report.num_truncated) == (f"{path}:1", 1)
        assert note.reason == f"{num_tokens} tokens: the last 2 messages are dropped"
        assert "1 truncated" in prepared.report.summary()
    with pytest.raises(DatasetError, match="too long: "):  # not even the first exchange fits
        prepare(path, max_length=10, on_too_long="truncate")


@pytest.mark.promise("B10")
def test_a_row_that_the_format_cannot_render_is_bad(prepare: Prepare, tmp_path: Path) -> None:
    """P B10."""
    path = write(tmp_path / "d.jsonl", row("first"), row("\x16", "a"))
    with pytest.raises(DatasetError, match=r"d.jsonl:2: not a valid dialog.*U\+0016"):
        prepare(path)
    assert len(prepare(path, on_bad_row="skip").train) == 1


@pytest.mark.parametrize(("num", "held_out"), [(200, 20), (101, 10), (11, 1), (2, 1)])
def test_held_out_is_the_asked_share_and_deterministic(
    prepare: Prepare, tmp_path: Path, num: int, held_out: int
) -> None:
    rows = questions(num)
    prepared = prepare(write(tmp_path / "d.jsonl", *rows), held_out=0.1, split_seed=1)
    train, held_out_questions = questions_of(prepared), questions_of(prepared, "held_out")
    assert (len(train), len(held_out_questions)) == (num - held_out, held_out)
    assert sorted(train + held_out_questions) == sorted(r["prompt"] for r in rows)
    reordered = prepare(write(tmp_path / "r.jsonl", *rows[::-1]), held_out=0.1, split_seed=1)
    assert (questions_of(reordered)[::-1], questions_of(reordered, "held_out")[::-1]) == (train, held_out_questions)
    other = prepare(write(tmp_path / "d.jsonl", *rows), held_out=0.1, split_seed=2)
    assert num < 100 or questions_of(other, "held_out") != held_out_questions


def test_held_out_may_be_a_number_of_rows(prepare: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *questions(50), *(row("question 3", f"again {n}") for n in range(5)))
    prepared = prepare(path, held_out=20)
    train, held_out_questions = questions_of(prepared), questions_of(prepared, "held_out")
    assert 20 <= len(held_out_questions) <= 25
    assert len(train) + len(held_out_questions) == 55
    assert not set(train) & set(held_out_questions)
    for number in (55, 56, 10**12):
        with pytest.raises(DatasetError, match=f"data.held_out is {number}, but there are only 55 rows"):
            prepare(path, held_out=number)


def test_the_seed_of_a_run_does_not_choose_what_is_held_out(prepare: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *questions(200))
    held_out_questions = [questions_of(prepare(path, held_out=0.1, seed=seed), "held_out") for seed in (0, 1, 7)]
    assert held_out_questions[0] == held_out_questions[1] == held_out_questions[2]


def test_conversations_with_the_same_question_stay_on_one_side(prepare: Prepare, tmp_path: Path) -> None:
    """No held-out question was trained on, whatever its system prompt, its answer, its case or its spaces."""
    rows = [
        row(
            f"{'Question' if index % 2 else '  question '} {index % 40}",
            f"answer {index}",
            system="S" if index % 3 else "",
        )
        for index in range(200)
    ]
    paths = [write(tmp_path / f"{half}.jsonl", *rows[half::2]) for half in (0, 1)]
    prepared = prepare(paths, held_out=0.1)
    sides = [{" ".join(q.lower().split()) for q in questions_of(prepared, side)} for side in ("train", "held_out")]
    assert sides[0].isdisjoint(sides[1])
    assert len(prepared.held_out) == 20


def test_split_without_held_out_rows_or_without_two_different_ones(prepare: Prepare, tmp_path: Path) -> None:
    assert len(prepare(write(tmp_path / "d.jsonl", *questions(3)), held_out=0).train) == 3
    same = [row("q", str(index)) for index in range(5)]
    with pytest.raises(DatasetError, match="5 conversations with 1 different first user messages"):
        prepare(write(tmp_path / "same.jsonl", *same), held_out=0.1)
    prepared = prepare(write(tmp_path / "two.jsonl", *same, row("other")), held_out=0.1)
    assert (len(prepared.train), len(prepared.held_out)) == (5, 1)


def test_duplicates_are_dropped_and_named_across_sources(prepare: Prepare, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", row("q", "one"), row("q", "two"), row(" q", "one\n"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "two"}]
    second = write(tmp_path / "b.jsonl", {"messages": turns}, row("Q", "two"))
    prepared = prepare([first, second])
    report = prepared.report
    assert questions_of(prepared) == ["q", "q", "Q"]  # case may matter in an answer
    assert [(note.source, note.reason) for note in report.duplicates] == [
        (f"{first}:3", f"duplicates {first}:1"),
        (f"{second}:1", f"duplicates {first}:2"),
    ]
    assert (report.num_duplicates, [source.num_duplicates for source in report.sources]) == (2, [1, 1])
    complete = prepare([first, second], deduplicate=False)
    assert (len(complete.train), complete.report.num_duplicates, complete.report.deduplicated) == (5, 2, False)


def test_an_answer_that_is_rated_twice_is_no_duplicate(prepare: Prepare, tmp_path: Path) -> None:
    rated = [row("q", "a", label=label) for label in (True, False, True)]
    prepared = prepare(write(tmp_path / "d.jsonl", *rated), kind="unpaired_preference")
    assert (len(prepared.train), prepared.report.num_duplicates) == (2, 1)


def test_given_evaluation_rows_are_not_trained_on(prepare: Prepare, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *questions(10), row("QUESTION 3 ", "another answer"))
    evaluation = write(tmp_path / "eval.jsonl", row("question 3"), row("question 5", "x"), row("new"), row("new"))
    prepared = prepare(train, held_out_path=evaluation, held_out=0.1)
    assert questions_of(prepared, "held_out") == ["question 3", "question 5", "new"]
    assert questions_of(prepared) == [f"question {n}" for n in range(10) if n not in (3, 5)]
    assert (prepared.report.num_leaked, prepared.report.num_duplicates) == (3, 1)
    assert "3 also held out" in prepared.report.summary()
    with pytest.raises(DatasetError, match="leaves no training row that is not also held out"):
        prepare(train, held_out_path=train)


def test_a_weight_takes_a_sources_rows_so_often(prepare: Prepare, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", *(row(f"{n} {i}") for i in range(20))) for n in "abc"]
    weighed = [paths[0], {"path": paths[1], "weight": 0.5}, {"path": paths[2], "weight": 2.25}]
    prepared = prepare(weighed, held_out=0.1)
    questions = questions_of(prepared)
    report = prepared.report
    for source, name, weight in zip(report.sources, "abc", (1, 0.5, 2.25), strict=True):
        own = [question for question in questions if question.startswith(name)]
        assert source.num_train_rows == len(own) == round(weight * (20 - source.num_held_out))
        counts = {own.count(question) for question in own}
        assert counts <= {int(weight), int(weight) + 1}
    assert len(prepared.held_out) == 6  # not weighed
    assert questions_of(prepare(weighed, held_out=0.1)) == questions
    assert questions_of(prepare(weighed, held_out=0.1, seed=3)) != questions
    assert not set(questions) & set(questions_of(prepared, "held_out"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(
        st.lists(
            st.tuples(st.sampled_from(["a", "A ", "b", " b", "c", "d", "e", "f"]), st.sampled_from(["x", "y", "x "])),
            min_size=1,
            max_size=12,
        ),
        min_size=1,
        max_size=3,
    ),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
    seed=st.integers(0, 5),
    deduplicate=st.booleans(),
)
def test_the_split_never_leaks(
    prepare: Prepare,
    tmp_path: Path,
    sources: list[list[tuple[str, str]]],
    weight: float,
    fraction: float,
    seed: int,
    deduplicate: bool,
) -> None:
    """No question is on both sides, no row is lost or invented, whatever repeats and however sources are weighed."""
    paths = [
        {"path": write(tmp_path / f"{n}.jsonl", *(row(q, a) for q, a in rows)), "weight": 1 if n else weight}
        for n, rows in enumerate(sources)
    ]
    options = {"held_out": fraction, "seed": seed, "deduplicate": deduplicate}
    try:
        prepared = prepare(paths, **options)
    except DatasetError as error:
        if not re.search("different first user messages|the weights leave", str(error)):
            raise
        return
    train, held_out = ({q.strip().lower() for q in questions_of(prepared, side)} for side in ("train", "held_out"))
    assert train.isdisjoint(held_out)
    assert len(held_out)
    given_rows = [(q.strip(), a.strip()) for rows in sources for q, a in rows]
    report = prepared.report
    assert report.num_duplicates == len(given_rows) - len(set(given_rows))
    if weight == 1:
        usable = len(set(given_rows)) if deduplicate else len(given_rows)
        assert report.num_train_rows + report.num_held_out == usable
    assert report.num_train_rows == sum(source.num_train_rows for source in report.sources)


def test_samples_are_spread_over_the_held_out_conversations(prepare: Prepare, tmp_path: Path) -> None:
    prepared = prepare(write(tmp_path / "d.jsonl", *questions(600)), held_out=0.5)
    samples = [sample.messages[0].content for sample in prepared.held_out_samples()]
    held_out = questions_of(prepared, "held_out")
    assert len(samples) == len(set(samples)) == 100
    assert samples[0] == held_out[0]
    assert samples[-1] == held_out[-1]


def test_rows_are_prepared_once_and_again_when_anything_changes(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_writes: list[int] = []
    real = build_store.read_into

    def counted(*args: Any, **options: Any) -> Any:
        store_writes.append(1)
        return real(*args, **options)

    monkeypatch.setattr(store_cache, "read_into", counted)
    path = write(tmp_path / "d.jsonl", *questions(20))
    prepare(path)
    prepare(path, held_out=0.2, seed=4, deduplicate=False)  # decided after reading
    prepare({"path": path, "weight": 3})
    assert len(store_writes) == 1
    for number, change in enumerate(
        ({"max_length": 199}, {"max_rows": 9}, {"format": "prompt_completion"}, {"on_too_long": "truncate"}), start=2
    ):
        prepare(path, **change)
        assert len(store_writes) == number
    stat = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("question 1", "question x"))  # same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time
    assert "question x" in questions_of(prepare(path))


def test_the_cache_knows_every_module_that_makes_a_store() -> None:
    """A changed rendering, hash or format must not reuse the rows of the old one."""
    graph = import_graph()
    makers, pending = set(), ["training.data.build_store"]
    while pending:
        module = pending.pop()
        makers.add(module)
        pending += [other for other in graph[module] if other not in makers]
    indifferent = {  # settings are in the key, the base by its tokenizer's files
        "training.config.data_config",
        "training.errors",
        "training.home",
        "training.base_models.embedded",
        "training.base_models.resolve",
    }
    assert {modules()[module] for module in makers - indifferent} <= set(store_cache.code_files())


def test_a_store_that_was_not_finished_is_not_used(prepare: Prepare, tmp_path: Path) -> None:
    """A writer that is killed leaves nothing that a later run takes for complete."""
    path = write(tmp_path / "d.jsonl", *questions(20), "bad")
    with pytest.raises(DatasetError):
        prepare(path)
    assert not [*(corral_home() / "cache" / "datasets").glob(".writing-*")]
    assert len(prepare(path, on_bad_row="skip").train) == 20


def test_stores_that_nobody_used_for_long_are_removed(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / "cache" / "datasets"

    def stores() -> set[Path]:
        return {path for path in cache.iterdir() if path.is_dir()}

    opened = prepare(write(tmp_path / "a.jsonl", *questions(20))).train
    [old] = stores()
    for path in (old, *old.iterdir()):
        os.utime(path, (0, time.time() - 40 * 86_400))
    prepare(write(tmp_path / "b.jsonl", *questions(21)))
    [remaining] = stores()
    assert remaining != old
    assert len(opened[0]["input_ids"]) > 0  # a process that has it open continues to read
    monkeypatch.setattr(store_cache, "_CACHE_BYTES", 1)
    prepare(write(tmp_path / "c.jsonl", *questions(22)))
    assert len(stores()) == 1
    assert remaining not in stores()


def test_a_disk_that_is_full_is_named(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file size limit of the process stands in for the disk's."""
    path = write(tmp_path / "d.jsonl", *questions(2000))
    script = (
        "import resource, signal, sys\n"
        "from training.config.train_config import TrainConfig\n"
        "from training.errors import DatasetError\n"
        "from training.data.run_inputs import read_data\n"
        "config = TrainConfig.model_validate({'adapter': 'a', 'data': {'path': sys.argv[1]}})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    read_data(config)\n"
        "except DatasetError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert "cannot be prepared in" in result.stdout
    assert "set CORRAL_HOME to a larger disk" in result.stdout


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    """Twenty times the rows take at most a fifth more memory, rows and tokens being on disk."""

    def peak_mib(num_rows: int) -> float:
        path = tmp_path / f"{num_rows}.{suffix}"
        rows = [row(f"{index} " + "hum " * 60, f"answer {index} " * 20) for index in range(num_rows)]
        if suffix == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        else:
            write(path, *rows)
        script = (
            "import re, sys\n"
            "from training.config.train_config import TrainConfig\n"
            "from training.data.run_inputs import read_data\n"
            "data = {'path': sys.argv[1], 'held_out': 0.1}\n"
            "config = TrainConfig.model_validate({'adapter': 'a', 'data': data})\n"
            "prepared = read_data(config)\n"
            "assert len(prepared.train) + len(prepared.held_out) == int(sys.argv[2])\n"
            "order = range(0, len(prepared.train), 7)\n"
            "assert all(len(prepared.train[at]['input_ids']) > 100 for at in order)\n"
            # not ru_maxrss, which a child inherits from its parent
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)\n"
        )
        command = [sys.executable, "-c", script, str(path), str(num_rows)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few, many = peak_mib(500), peak_mib(10_000)
    assert many < few * 1.2, f"{few:.0f} MiB for 500 rows, {many:.0f} MiB for 10,000"


def test_workers_of_one_machine_prepare_once(tmp_path: Path) -> None:
    """Three processes that start at once end with one store, and with the same rows."""
    path = write(tmp_path / "d.jsonl", *questions(300))
    script = (
        "import hashlib, sys\n"
        "from training.config.train_config import TrainConfig\n"
        "from training.data.run_inputs import read_data\n"
        "config = TrainConfig.model_validate({'adapter': 'a', 'data': {'path': sys.argv[1]}})\n"
        "rows = read_data(config).train\n"
        "print(hashlib.sha256(repr([*rows]).encode()).hexdigest())\n"
    )
    stores = corral_home() / "cache" / "datasets"
    before = {entry for entry in stores.glob("*") if entry.is_dir()}
    command = [sys.executable, "-c", script, path]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {worker.communicate(timeout=300)[0] for worker in workers}
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65
    assert len({entry for entry in stores.glob("*") if entry.is_dir()} - before) == 1
