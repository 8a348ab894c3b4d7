"""The templates of an exported model give the ids that the adapter was trained on."""

from typing import get_args

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.training.chat.test_chat_format import FIXTURES
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.resolve import resolve_base_model
from training.chat.chat_format import ChatFormat
from training.chat.jinja_templates import chat_template
from training.chat.messages import Message
from training.chat.templates import ChatFormatName

NAMES: tuple[ChatFormatName, ...] = get_args(ChatFormatName)
# Ordinary text: what looks like a control token is one for other software.
texts = st.text("abc DE.,?!\n", min_size=1, max_size=12).filter(str.strip)
answers = texts.map(str.strip)  # chatml encodes the space in front of an answer apart from what precedes it


def tokenizer_of(name: str) -> Tokenizer:
    if name == "chatml":
        return Tokenizer.from_file(str(resolve_base_model(EMBEDDED_MODEL).path / "tokenizer.json"))
    return Tokenizer.from_file(str(FIXTURES / f"{name.replace('-', '')}_reduced_tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: tokenizer_of(name) for name in NAMES}


@pytest.mark.promise("E1")
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(system=st.none() | texts, turns=st.lists(st.tuples(texts, answers), max_size=3), last=texts)
def test_template_and_chat_format_give_the_same_ids(
    tokenizers: dict[str, Tokenizer],
    name: ChatFormatName,
    system: str | None,
    turns: list[tuple[str, str]],
    last: str,
) -> None:
    dialog = [Message("system", system)] if system is not None else []
    for user, assistant in turns:
        dialog += [Message("user", user), Message("assistant", assistant)]
    dialog.append(Message("user", last))
    tokenizer = tokenizers[name]
    tokenizer.encode_special_tokens = True
    expected = ChatFormat(name, tokenizer).render_prompt(dialog)
    # as transformers compiles and tokenizes templates
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template(name))
    text = template.render(
        messages=[{"role": message.role, "content": message.content} for message in dialog],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_chatml_begins_with_bos_where_the_base_asks_for_it() -> None:
    assert chat_template("chatml", "<s>").startswith("<s>{%")
