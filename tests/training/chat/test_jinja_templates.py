"""The templates of an exported model give the ids that the adapter was trained on."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.training.chat.test_chat_format import FIXTURES
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.resolve import resolve_base_model
from training.chat.chat_format import ChatFormat
from training.chat.default_system import DefaultSystem
from training.chat.jinja_templates import chat_template
from training.chat.messages import Message, ToolCall
from training.chat.templates import ChatFormatName
from training.chat.tools import with_tools

NAMES: tuple[ChatFormatName, ...] = get_args(ChatFormatName)
# Ordinary text: what looks like a control token is one for other software.
texts = st.text("abc DE.,?!\n", min_size=1, max_size=12).filter(str.strip)
answers = texts.map(str.strip)  # chatml encodes the space in front of an answer apart from what precedes it
# As a base's template may add it; llama-2's reduced vocabulary lacks most characters, so these are few.
defaults = st.none() | st.builds(
    DefaultSystem,
    st.text("abc DE'\"\\\n{%}", min_size=1, max_size=8).filter(lambda text: text.strip() == text),
    st.sampled_from(["", "Today: 1\n\n"]),
)


def tokenizer_of(name: str) -> Tokenizer:
    if name == "chatml":
        return Tokenizer.from_file(str(resolve_base_model(EMBEDDED_MODEL).path / "tokenizer.json"))
    return Tokenizer.from_file(str(FIXTURES / f"{name.replace('-', '')}_reduced_tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: tokenizer_of(name) for name in NAMES}


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "a", "description": "D E", "parameters": {"type": "object", "properties": {"b": {}}}},
    },
    {"type": "function", "function": {"name": "b"}},
]
calls = st.lists(
    st.builds(lambda name, b: ToolCall(name, json.dumps({"b": b})), st.sampled_from("ab"), texts), max_size=2
)


@st.composite
def dialogs(draw: st.DrawFn) -> list[Message]:
    """Dialogs that ask for an answer, with calls and their results."""
    dialog = [Message("system", text) for text in draw(st.lists(texts, max_size=1))]
    for user, answer, called in draw(st.lists(st.tuples(texts, answers, calls), max_size=3)):
        dialog += [Message("user", user), Message("assistant", answer, tool_calls=tuple(called))]
        if called:
            dialog += [Message("tool", draw(texts)) for _ in called]
            dialog += [Message("assistant", draw(answers))]
    return [*dialog, Message("user", draw(texts))]


@pytest.mark.promise("E1", "F2", "F5")
@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=80)
@given(dialog=dialogs(), tools=st.sampled_from([[], TOOLS]), default=defaults)
def test_template_and_chat_format_give_the_same_ids(
    tokenizers: dict[str, Tokenizer],
    name: ChatFormatName,
    dialog: list[Message],
    tools: list[dict[str, Any]],
    default: DefaultSystem | None,
) -> None:
    tokenizer = tokenizers[name]
    tokenizer.encode_special_tokens = True
    if default is not None and name != "llama-3":
        default = replace(default, prefix="")
    expected = ChatFormat(name, tokenizer, default_system=default).render_prompt(with_tools(dialog, tools))
    [text], _ = render_jinja_template(
        [[as_transformers_takes_it(message) for message in dialog]],
        tools=tools or None,
        chat_template=chat_template(name, default_system=default),
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def as_transformers_takes_it(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        called = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
        turn["tool_calls"] = [{"type": "function", "function": function} for function in called]
    return turn


def test_chatml_begins_with_bos_where_the_base_asks_for_it() -> None:
    assert chat_template("chatml", "<s>").startswith("<s>{%-")
