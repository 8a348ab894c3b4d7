"""Text of an answer as it grows: complete characters, nothing of a stop string (A6), and each token's own bytes."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deployments.text.detokenizer import Detokenizer, SentText
from deployments.text.vocabulary import Vocabulary
from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
FAMILIES = ("embedded", "llama2", "llama3")


@pytest.fixture(scope="module")
def tokenizers(embedded_base: BaseCheckpoint) -> dict[str, Tokenizer]:
    reduced = {name: Tokenizer.from_file(str(FIXTURES / f"{name}_reduced_tokenizer.json")) for name in FAMILIES[1:]}
    return {"embedded": load_tokenizer(embedded_base), **reduced}


@pytest.fixture(scope="module")
def vocabularies(tokenizers: dict[str, Tokenizer]) -> dict[str, Vocabulary]:
    return {name: Vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def known_ids(tokenizers: dict[str, Tokenizer]) -> dict[str, list[int]]:
    return {name: sorted(tokenizer.get_vocab().values()) for name, tokenizer in tokenizers.items()}


def encode(tokenizers: dict[str, Tokenizer], text: str, family: str = "embedded") -> list[int]:
    return list(tokenizers[family].encode(text, add_special_tokens=False).ids)


def pieces(detokenizer: Detokenizer, token_ids: list[int], batch: int = 1) -> tuple[list[str], list[int]]:
    """The text that was sent, and the offsets of its tokens."""
    sent: list[SentText] = []
    for start in range(0, len(token_ids), batch):
        sent.append(detokenizer.push(token_ids[start : start + batch]))
        if detokenizer.stopped:
            break
    else:
        sent.append(detokenizer.flush())
    return [part.text for part in sent], [offset for part in sent for offset in part.token_offsets]


odd_texts = st.text(alphabet="aé漢👩‍👩‍👧🏽 \n<>|", max_size=40)
short_texts = st.text(alphabet="abc d", max_size=40)
stop_strings = st.lists(st.text("abc d", min_size=1, max_size=5), max_size=3)


@pytest.mark.promise("A6")
@settings(max_examples=60, deadline=None)
@given(text=odd_texts)
def test_pieces_are_whole_characters_and_add_up_to_the_text(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary], text: str
) -> None:
    for family, vocabulary in vocabularies.items():
        out, _ = pieces(Detokenizer(vocabulary), encode(tokenizers, text, family))
        assert "�" not in "".join(out)
        assert "".join(out) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_any_tokens_give_the_text_that_the_tokenizer_decodes(
    tokenizers: dict[str, Tokenizer],
    vocabularies: dict[str, Vocabulary],
    known_ids: dict[str, list[int]],
    data: st.DataObject,
    family: str,
) -> None:
    token_ids = data.draw(st.lists(st.sampled_from(known_ids[family]), max_size=12))
    out, offsets = pieces(Detokenizer(vocabularies[family]), token_ids)
    assert len(offsets) == len(token_ids)
    decoded = tokenizers[family].decode(token_ids, skip_special_tokens=True)
    if "�" not in decoded:
        assert "".join(out) == decoded


@settings(max_examples=100, deadline=None)
@given(text=odd_texts)
def test_the_bytes_of_the_tokens_are_the_text_and_offsets_say_where(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary], text: str
) -> None:
    for family, vocabulary in vocabularies.items():
        token_ids = encode(tokenizers, text, family)
        spellings = [vocabulary.spelling(token_id) for token_id in token_ids]
        prefix = b" " if vocabulary.strips_first_space and text else b""
        assert b"".join(spellings) == prefix + text.encode()
        _, offsets = pieces(Detokenizer(vocabulary), token_ids)
        for i, offset in enumerate(offsets):
            before = b"".join(spellings[:i]).removeprefix(prefix)
            assert offset == len(before.decode(errors="ignore"))


def test_control_tokens_are_spelled_and_add_no_text(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    for family, name in (("embedded", "<|im_end|>"), ("llama2", "</s>"), ("llama3", "<|eot_id|>")):
        token_id = tokenizers[family].token_to_id(name)
        assert vocabularies[family].spelling(token_id) == name.encode()
        assert vocabularies[family].text_bytes(token_id) == b""
    assert vocabularies["embedded"].spelling(10_000_000) == b""  # a row of the model that is no token


@pytest.mark.promise("A6")
@settings(max_examples=100, deadline=None)
@given(text=short_texts, stop=stop_strings)
def test_nothing_of_a_stop_string_is_sent(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary], text: str, stop: list[str]
) -> None:
    detokenizer = Detokenizer(vocabularies["embedded"], stop)
    out, _ = pieces(detokenizer, encode(tokenizers, text))
    offsets = [at for at in (text.find(s) for s in stop) if at >= 0]
    assert detokenizer.stopped == bool(offsets)
    sent = "".join(out)
    if not offsets:
        assert sent == text
    else:
        assert text.startswith(sent)
        assert not any(s in sent for s in stop)


@pytest.mark.promise("A7")
@settings(max_examples=100, deadline=None)
@given(text=st.one_of(odd_texts, short_texts), stop=stop_strings, batch=st.integers(2, 50))
def test_tokens_that_come_together_give_what_they_give_one_by_one(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary], text: str, stop: list[str], batch: int
) -> None:
    token_ids = encode(tokenizers, text)
    one_by_one, together = (Detokenizer(vocabularies["embedded"], stop) for _ in range(2))
    (singles, offsets), (batches, batch_offsets) = pieces(one_by_one, token_ids), pieces(together, token_ids, batch)
    assert "".join(singles) == "".join(batches)
    assert offsets == batch_offsets
    assert (one_by_one.stopped, one_by_one.num_tokens) == (together.stopped, together.num_tokens)


@pytest.mark.promise("A6")
def test_a_stop_string_over_token_borders_takes_its_tokens_with_it(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    token_ids = encode(tokenizers, "The answer is forty-two. END OF FILE and more")
    for stop, sent in (("END OF FILE", "The answer is forty-two. "), ("rty-two", "The answer is fo"), ("The", "")):
        detokenizer = Detokenizer(vocabularies["embedded"], [stop])
        out, offsets = pieces(detokenizer, token_ids)
        assert detokenizer.stopped
        assert "".join(out) == sent
        text = b"".join(map(vocabularies["embedded"].spelling, token_ids[: len(offsets)])).decode()
        assert sent.startswith(text)
        assert len(sent) - len(text) < len(" forty")  # of a token that the stop string begins in
        assert len(offsets) < detokenizer.num_tokens  # those of the stop string were made, and count


def test_tokens_wait_for_the_text_that_is_held_back(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    detokenizer = Detokenizer(vocabularies["embedded"], ["ab ab ab!"])
    first, second, *_ = encode(tokenizers, "x ab")
    assert detokenizer.push([first]) == SentText("x", [0])
    assert detokenizer.push([second]) == SentText(" ", [])  # its text may be the beginning of the stop string
    assert detokenizer.push([second]) == SentText("", [])
    assert detokenizer.flush() == SentText("ab ab", [1, 4])


def test_a_character_in_several_tokens_may_be_a_stop_string(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    detokenizer = Detokenizer(vocabularies["embedded"], ["👩"])
    out, offsets = pieces(detokenizer, encode(tokenizers, "a👩"))
    assert ("".join(out), offsets, detokenizer.stopped) == ("a", [0], True)


def test_stop_strings_count_after_min_tokens(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    token_ids = encode(tokenizers, "one two one two one two")
    detokenizer = Detokenizer(vocabularies["embedded"], [" two"], min_tokens=2)
    out, _ = pieces(detokenizer, token_ids)
    assert "".join(out) == "one two one"
    assert detokenizer.num_tokens == 4


def test_half_a_character_at_the_end_is_dropped(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    token_ids = encode(tokenizers, "ok 👩")
    out, offsets = pieces(Detokenizer(vocabularies["embedded"]), token_ids[:-1])
    assert "".join(out).rstrip() == "ok"
    assert len(offsets) == len(token_ids) - 1


def test_a_text_that_goes_on_keeps_its_first_space_and_a_new_one_has_none(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    hi = encode(tokenizers, "hi", "llama2")
    for prompt, first in (([], "hi"), ([1], "hi"), ([1, *hi], " hi")):
        detokenizer = Detokenizer(vocabularies["llama2"], prompt_token_ids=prompt)
        assert "".join(pieces(detokenizer, hi)[0]) == first


def test_a_text_may_go_on_in_the_middle_of_a_character(
    tokenizers: dict[str, Tokenizer], vocabularies: dict[str, Vocabulary]
) -> None:
    token_ids = encode(tokenizers, "ok 👩")
    detokenizer = Detokenizer(vocabularies["embedded"], prompt_token_ids=token_ids[:-1])
    assert pieces(detokenizer, token_ids[-1:])[0] == ["👩", ""]
