"""What `corral demo` counts and prints; the path itself is tests/end_to_end/test_main_job.py's."""

import pytest

from clients.demo import Question, load_questions


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
