"""`corral data check`: what a person sees of a dataset, and what a program reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner, Result

from clients.cli import data
from clients.cli.main import app
from training.base_models.resolve import BaseCheckpoint
from training.data.report import DataReport, Segment

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    """61 questions with unfamiliar column names: one duplicate, one without an answer, one too long."""
    path = tmp_path / "questions.csv"
    rows = [f"Where is gate {n}?,Gate {n} is by the barn." for n in range(58)]
    rows += ["Where is gate 7?,Gate 7 is by the barn.", "Who hums?,", f"{'Why? ' * 80},Because."]
    path.write_text("question,answer\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def check(tiny_base: BaseCheckpoint) -> Any:
    def run(*arguments: object) -> Result:
        options = [] if "--config" in arguments else ["--base", str(tiny_base.path)]
        if not {"--config", "--max-length"} & set(arguments):
            options += ["--max-length", "200"]
        return CliRunner().invoke(app, ["data", "check", *map(str, arguments), *options])

    return run


COLUMNS = "data.columns={prompt: question, completion: answer}"


def test_check_shows_what_a_run_would_see(check: Any, csv_file: Path) -> None:
    """P B10: all bad rows at once, each with file, line, reason and first characters."""
    result = check(csv_file, COLUMNS, "--max-length", 100)
    assert result.exit_code == 0, result.output
    output = result.stdout
    for words in (
        "format  prompt_completion (60)",
        "rows  61 read, 2 cannot be used, 1 duplicates left out",
        "split  52 for training, 6 held out",
        "roles  user (59), assistant (59)",
        "tiny-llama, chat format chatml, max_length 100",
        "Rows that cannot be used: 1",
        f"{csv_file}:61: messages[1]: the answer is empty",
        'the row starts with \'{"question": "Who hums?", "answer": ""}\'',
        "Rows that are too long: 1",
        f"{csv_file}:62: too long: 195 tokens, max_length is 100",
        "Duplicates: 1",
        f"{csv_file}:60: duplicates {csv_file}:9",
        "1 too long",
        "left out by a max_length of: 100 (1 rows), 128 (1 rows)",
        " is by the barn.<|im_end|>»",
        "█",
    ):
        assert words in output, f"{words!r} is not in\n{output}"
    assert "«<|im_start|>" not in output


def test_check_as_json_is_the_report(check: Any, csv_file: Path) -> None:
    result = check(csv_file, COLUMNS, "--json")
    report = DataReport.model_validate(json.loads(result.stdout))
    assert (report.num_rows_read, report.num_skipped, report.num_duplicates) == (61, 1, 1)
    assert report.sources[0].path == str(csv_file)


def test_check_says_which_keys_are_not_used(check: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "Say hi.", "output": "Hi.", "topics": ["wave"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"instruction": "Say ho.", "topics": None}) + "\n")
    assert "not used  topics (1 rows)\n" in check(path).stdout
    assert json.loads(check(path, "--json").stdout)["unused_keys"] == {"topics": 1}


def test_check_of_a_training_yaml_sees_its_settings(
    check: Any, csv_file: Path, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        f"adapter: gates\nbase_model: {tiny_base.path}\nmax_length: 64\nseed: 5\n"
        f"data:\n  path: {csv_file}\n  columns: {{prompt: question, completion: answer}}\n  held_out: 0.5\n"
    )
    report = DataReport.model_validate(json.loads(check("--config", config, "--json").stdout))
    assert (report.max_length, report.num_too_long, report.num_train_rows, report.num_held_out) == (64, 1, 29, 29)
    overridden = check("--config", config, "--json", "data.held_out=0", "max_length=500")
    report = DataReport.model_validate(json.loads(overridden.stdout))
    assert (report.max_length, report.num_too_long, report.num_held_out) == (500, 0, 0)
    other = tmp_path / "other.csv"
    other.write_text("question,answer\nq,a\nr,b\n")
    report = DataReport.model_validate(json.loads(check("--config", config, other, "--json").stdout))
    assert [source.path for source in report.sources] == [str(other)]


def test_the_readmes_csv_is_as_the_readme_shows_it(check: Any) -> None:
    """The section "Train on your own data" quotes these lines."""
    recipe, rows = (PROJECT / "configs" / name for name in ("train/workshop.yaml", "datasets/workshop.csv"))
    output = check("--config", recipe, rows).stdout
    assert "77 read, 1 cannot be used, 1 duplicates left out" in output
    assert "64 for training, 11 held out" in output
    assert "workshop.csv:43: messages[1]: the answer is empty" in output
    assert "workshop.csv:22: duplicates" in output
    unmapped = check(rows, "--max-length", 128)
    assert unmapped.exit_code == 1
    assert "the row has the keys answer, question" in unmapped.stderr
    assert "need data.columns, such as {prompt: question, completion: answer}" in unmapped.stderr


def test_check_of_preferences_shows_both_answers(check: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "yes, it is", "rejected": "no, it is not"} for n in range(4)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    result = check(path, "--method", "dpo")
    assert "«yes, it is<|im_end|>»[-no, it is not<|im_end|>-]" in result.stdout
    assert "preference (4)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "no data is given: pass files, folders, globs or hub ids, or --config"),
        (("nowhere.csv",), 1, "dataset 'nowhere.csv' is neither a file, folder or glob"),
        (("data.path=nowhere.csv",), 1, "dataset 'nowhere.csv' is neither a file"),
        (("x.jsonl", "data.colums={}"), 2, "unknown key 'data.colums' (value {}): did you mean 'data.columns'?"),
    ],
)
def test_mistakes_are_one_line(check: Any, arguments: tuple[str, ...], code: int, words: str) -> None:
    """P B11."""
    result = check(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_terminal_shows_the_trained_tokens_in_colour() -> None:
    row = [Segment(text="[b]question[/b] ", role="context"), Segment(text="answer", role="trained")]
    text = data._coloured(row, Console(force_terminal=True, color_system="truecolor"))
    assert isinstance(text, Text)
    assert text.plain == "[b]question[/b] answer"  # markup in a row is text
    assert [(span.start, span.end, str(span.style)) for span in text.spans] == [(0, 16, "dim"), (16, 22, "bold green")]
