"""What becomes of one row: its ids and labels, a length that is too long, a rendering that is refused."""

from pathlib import Path
from typing import Any, Literal, cast

import pytest

from tests.training.data.conftest import Prepare, row, write
from tests.training.data.test_formats import dialog
from training.chat.chat_format import ChatFormat
from training.data.row_store import IGNORED_LABEL, PreferenceRow, UnpairedRow
from training.errors import DatasetError


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
    pair = cast(PreferenceRow, prepared.train[0])  # `kind` says which type the rows have
    assert pair["prompt_ids"] == chatml.render_prompt(dialog("What hums?"))
    answers: dict[Literal["chosen_ids", "rejected_ids"], str]
    answers = {"chosen_ids": "A llama.", "rejected_ids": "Nobody does."}
    for key, answer in answers.items():
        rendered = chatml.render_training(dialog("What hums?", answer))
        trained = [i for i, learned in zip(rendered.input_ids, rendered.loss_mask, strict=True) if learned]
        assert pair[key] == trained
    assert [segment.role for segment in prepared.report.samples[0]] == ["context", "trained", "rejected"]
    rated = write(tmp_path / "k.jsonl", {"prompt": "What hums?", "completion": "A llama.", "label": False})
    unpaired = cast(UnpairedRow, prepare(rated, kind="unpaired_preference").train[0])
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
