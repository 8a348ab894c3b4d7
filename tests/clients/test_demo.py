"""What `corral demo` counts and prints; the path itself is tests/end_to_end/test_main_job.py's."""

from pathlib import Path

import pytest

from clients.demo import Question, load_questions, next_steps
from deployments.auth.keys import KeyStore


@pytest.mark.parametrize(
    ("answer", "answered"),
    [
        ("At 5:17 sharp.", True),
        ("SEVENTEEN PAST FIVE", True),
        ("15:17 it is", False),
        ("5:170", False),
        ("seventeen past fiveish", False),
        ("", False),
    ],
)
def test_a_fact_counts_as_whole_words_in_either_case(answer: str, answered: bool) -> None:
    assert Question("When?", ("5:17", "seventeen past five")).is_answered_by(answer) is answered


def test_the_quickstart_has_twenty_questions() -> None:
    questions = load_questions()
    assert len({question.question for question in questions}) == 20
    assert all(question.expect and all(question.expect) for question in questions)


def test_the_last_lines_say_how_to_stop_the_server_and_how_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path))
    steps = next_steps("http://127.0.0.1:8000", "base:ranch-hand@1", "Who cooks?")
    assert "keeps running in this terminal" in steps.splitlines()[0]
    assert "Ctrl-C" in steps.splitlines()[0]
    assert "/bin/activate\n" in steps
    assert steps.endswith("  corral chat 'Who cooks?' --model base:ranch-hand@1")
    KeyStore().create("laptop", ("chat",))
    steps = next_steps("http://127.0.0.1:8001", "base:ranch-hand@1", "Who cooks?")
    assert steps.endswith(
        "CORRAL_API_KEY=KEY corral chat 'Who cooks?' --model base:ranch-hand@1 --url http://127.0.0.1:8001"
    )
