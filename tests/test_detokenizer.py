"""Text of an answer as it grows: whole characters, and nothing of a stop string (A6)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deployments.detokenizer import Detokenizer
from training.base_models import BaseModel, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(embedded_base: BaseModel) -> Tokenizer:
    return load_tokenizer(embedded_base)


def pieces(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop)
    out = []
    for token_id in tokenizer.encode(text).ids:
        out.append(detokenizer.push([token_id]))
        if detokenizer.stopped:
            return out, True
    return [*out, detokenizer.flush()], False


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé漢👩‍👩‍👧🏽 \n<>|", max_size=40))
def test_a6_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    out, _ = pieces(tokenizer, text, [])
    assert "�" not in "".join(out)
    assert "".join(out) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="abc d", max_size=40), stop=st.lists(st.text("abc d", min_size=1, max_size=5), max_size=3))
def test_a6_nothing_of_a_stop_string_is_sent(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    out, stopped = pieces(tokenizer, text, stop)
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    assert stopped == bool(found)
    if not found:
        assert "".join(out) == text
    else:
        sent = "".join(out)
        assert text.startswith(sent)
        assert not any(s in sent for s in stop)


def test_a6_a_stop_string_over_token_borders(tokenizer: Tokenizer) -> None:
    out, stopped = pieces(tokenizer, "The answer is forty-two. END OF FILE and more", ["END OF FILE"])
    assert stopped
    assert "".join(out) == "The answer is forty-two. "


def test_half_a_character_at_the_end_is_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 👩").ids
    detokenizer = Detokenizer(tokenizer)
    assert (detokenizer.push(ids[:-1]) + detokenizer.flush()).rstrip() == "ok"
