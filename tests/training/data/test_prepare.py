"""A dataset from its files to the two sides of a run: rows read, duplicates, the held-out split, weights."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.training.data.conftest import Prepare, questions, questions_of, row, write
from tests.training.data.test_formats import FIXTURES, dialog
from training.config.data_config import DataConfig
from training.errors import DatasetError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


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
    ("sharegpt role", b'{"conversations": [{"from": "narrator", "value": "q"}]}', "has role 'narrator'"),
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
        "messages[0].tool_calls[0]: expected a call",
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
