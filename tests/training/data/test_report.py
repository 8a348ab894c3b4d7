"""The report's figures and warnings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.data.conftest import Prepare, row, write
from training.data.report import DataReport, length_report


def test_lengths_are_counted_in_bars_and_percentiles() -> None:
    lengths = np.arange(1, 101, dtype=np.uint32)
    report = length_report(lengths, {250: 2}, max_length=200)
    assert (report.p50, report.p95, report.max) == (51, 97, 250)
    assert report.mean == pytest.approx((5050 + 500) / 102)
    assert report.histogram == [(50, 50), (100, 50), (150, 0), (200, 0), (250, 2)]
    assert report.longer_than == {128: 2, 200: 2}


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [8000, 1]])
def test_every_row_is_in_one_bar(lengths: list[int]) -> None:
    report = length_report(np.array(lengths, dtype=np.uint32), {}, max_length=10_000)
    assert sum(count for _, count in report.histogram) == len(lengths)
    assert len(report.histogram) <= 13
    assert report.histogram[-1][1] > 0


def dialog(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_what_is_counted(prepare: Prepare, tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        dialog(("system", "S"), ("user", "q0"), ("assistant", "a"), ("user", "q"), ("assistant", "a")),
        *(row(f"question {n}") for n in range(8)),
        {"conversations": [{"from": "human", "value": "q9"}, {"from": "gpt", "value": "a"}]},
        row("question 0"),
    )
    prepared = prepare(path, held_out=0.2)
    report = prepared.report
    assert report.formats == {"prompt_completion": 9, "messages": 1, "sharegpt": 1}
    assert report.turns == {1: 10, 2: 1}
    assert report.roles == {"user": 12, "assistant": 12, "system": 1}
    assert (report.num_rows_read, report.num_rows, report.num_duplicates) == (11, 11, 1)
    assert (report.num_train_rows, report.num_held_out) == (8, 2)
    assert report.num_train_tokens == prepared.train.num_tokens == sum(len(r["input_ids"]) for r in prepared.train)
    assert report.num_trained_tokens == sum(sum(label >= 0 for label in r["labels"]) for r in prepared.train)
    assert (report.base, report.chat_format, report.max_length) == ("tiny-llama", "chatml", 200)
    assert len(report.samples) == 3
    for sample in report.samples:
        assert "".join(s.text for s in sample).startswith("<|im_start|>")
        assert [s.text.endswith("<|im_end|>") for s in sample if s.role == "trained"]
    assert DataReport.model_validate(json.loads(report.model_dump_json())) == report
    tokens = f"{report.num_train_tokens} tokens per epoch, {report.trained_share:.0%} of them trained"
    assert report.summary().splitlines()[0] == (
        f"data: 8 training and 2 held-out rows (prompt_completion, messages, sharegpt), {tokens}; dropped: 1 duplicates"
    )


EMPTY_SYSTEM = dialog(("system", " "), ("user", "q"), ("assistant", "so it is"))
MANY = [row(f"question {n}", f"a longer answer {n}") for n in range(60)]


@pytest.mark.parametrize(
    ("rows", "options", "warning"),
    [
        (MANY, {}, None),
        ([*MANY, EMPTY_SYSTEM], {}, "1 rows have an empty system prompt"),
        ([*MANY, row("q", "a<|im_end|>")], {}, "1 rows contain control tokens of a chat format as text"),
        ([*MANY, row("[INST] q [/INST]", "answer")], {}, "1 rows contain control tokens of a chat format as text"),
        ([row(f"question {n}", "yes") for n in range(60)], {}, "60 of 60 answers are a single token"),
        ([*MANY, *MANY], {}, "60 of 120 rows are duplicates and are dropped"),
        ([*MANY, *MANY], {"deduplicate": False}, "rows are duplicates and are kept (data.deduplicate is false)"),
        ([*MANY, *([1] * 10)], {"on_bad_row": "skip"}, "10 of 70 rows cannot be used"),
        (MANY, {"held_out": 0}, "no row is held out"),
        (MANY[:20], {}, "only 18 training rows"),
        ([row("why " * 100 + str(n), "so") for n in range(60)], {}, "of the tokens are trained, the rest are prompts"),
    ],
)
def test_warnings(prepare: Prepare, tmp_path: Path, rows: list[Any], options: Any, warning: str | None) -> None:
    report = prepare(write(tmp_path / "d.jsonl", *rows), **{"held_out": 0.1, **options}).report
    if warning is None:
        assert report.warnings == []
        return
    assert [message for message in report.warnings if warning in message], report.warnings
    assert f"data: note: {report.warnings[0]}" in report.summary()


def test_keys_that_are_not_used_are_counted_in_one_line(prepare: Prepare, tmp_path: Path) -> None:
    rows: list[Any] = [*(row(f"q{n}", "an answer", id=n + 1) for n in range(5)), row("t", "a", topics=["x"])]
    report = prepare(write(tmp_path / "d.jsonl", *rows)).report
    assert report.unused_keys == {"id": 5, "topics": 1}
    assert "data: unused keys: id (5 rows), topics (1 rows)" in report.summary().splitlines()
    used = prepare(write(tmp_path / "u.jsonl", *MANY)).report
    assert "unused" not in used.summary()
    wild = [row(f"q{n}", "an answer", **{f"key {n}": 1}) for n in range(1100)]
    report = prepare(write(tmp_path / "w.jsonl", *wild)).report
    assert len(report.unused_keys) == 1000
    assert report.unused.endswith("key 7 (1 rows) and 992 more")


def test_a_source_that_dominates_the_mix_is_named(prepare: Prepare, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", *(row(f"few {n}", "an answer") for n in range(3)))
    many = write(tmp_path / "many.jsonl", *MANY)
    assert any(f"are from {many}" in warning for warning in prepare([few, many], held_out=0.1).report.warnings)
    balanced = prepare([{"path": few, "weight": 20}, many], held_out=0.1).report
    assert not any("are from" in warning for warning in balanced.warnings)
