"""What looks like a tag is shown as typed, and code and formulas are left alone."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.ui.plain_text import shown, typed


@pytest.mark.parametrize(
    "text",
    [
        "a std::vector<int> here",
        "<b>bold</b> <script>alert(1)</script> <!-- gone --> <?php ?>",
        "a `code` then <T>",
        "``two ` ticks`` <T>",
        "an open ` tick <T>",
        "```\ncode\n```\n<T> after",
        "$5 <T> $6",
        "it is written &lt; <br>",
    ],
)
def test_a_tag_outside_code_is_marked(text: str) -> None:
    assert shown(text) != text
    assert shown(text).replace("\u2060", "") == text
    assert "<\u2060" in shown(text)


@pytest.mark.parametrize(
    "text",
    [
        "1 < 2 <3 << <= <-",
        "`vector<int>` and ``a ` <b>``",
        "```cpp\nvector<int> a;\n```",
        "text\n~~~\n<div>\n~~~\n",
        "```html\n<p>still open",
        "$$a<b$$ and \\(a<b\\) and \\[\na<b\n\\]",
        "| a | `<T>` |\n|---|---|\n| 1 | 2 |",
    ],
)
def test_code_formulas_and_comparisons_are_left_alone(text: str) -> None:
    assert shown(text) == text


@given(st.text(alphabet="<>&;a/!`~$\\()[]\n "))
def test_what_was_typed_comes_back(text: str) -> None:
    assert typed(shown(text)) == text
