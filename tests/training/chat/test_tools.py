"""Tools in chat formats (F2): what a dialog with calls and results is rendered to, and which of it carries loss."""

import json
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from tests.training.chat.test_chat_format import FIXTURES
from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.resolve import resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat, Rendered
from training.chat.messages import Message, ToolCall
from training.chat.tools import HERMES, LLAMA_3_JSON, TOOL_TAGS, with_tools
from training.errors import ChatFormatError

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "description": "Météo.",
        "name": "get_weather",
    },
}
LISTED = (
    '{"type": "function", "function": {"name": "get_weather", "description": "Météo.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
ROME, PARIS = ToolCall("get_weather", '{"city":"Rome"}', "a"), ToolCall("get_weather", '{"city": "Par"}', "b")
DIALOG = [
    Message("user", "Where is it warmer?"),
    Message("assistant", "Let me see.", tool_calls=(ROME, PARIS)),
    Message("tool", "22", tool_call_id="a"),
    Message("tool", "19", tool_call_id="b"),
    Message("assistant", "In Rome."),
]
HERMES_TOOLS = f"""# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{LISTED}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
HERMES_ANSWER = """Let me see.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "Par"}}
</tool_call>"""
CHATML = f"""<|im_start|>system
{HERMES_TOOLS}<|im_end|>
<|im_start|>user
Where is it warmer?<|im_end|>
<|im_start|>assistant
{HERMES_ANSWER}<|im_end|>
<|im_start|>user
<tool_response>
22
</tool_response>
<tool_response>
19
</tool_response><|im_end|>
<|im_start|>assistant
In Rome.<|im_end|>
"""
LLAMA_3_ANSWER = (
    'Let me see.\n{"name": "get_weather", "parameters": {"city": "Rome"}}; '
    '{"name": "get_weather", "parameters": {"city": "Par"}}'
)
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
    "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    f"{json.dumps(json.loads(LISTED), indent=4, ensure_ascii=False)}\n\nWhere is it warmer?<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{LLAMA_3_ANSWER}<|eot_id|>"
    '<|start_header_id|>ipython<|end_header_id|>\n\n"22"<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"19"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\nIn Rome.<|eot_id|>"
)


def chatml_tokenizer(*, with_tags: bool = False) -> Tokenizer:
    """The embedded model's; with tags, as Qwen's has them: added, but not special."""
    tokenizer = load_tokenizer(resolve_base_model(EMBEDDED_MODEL))
    if with_tags:
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS])
    return tokenizer


def llama_tokenizer(version: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(FIXTURES / f"llama{version}_reduced_tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def learned(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    runs = [[token_id for token_id, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.promise("F2", "E5")
@pytest.mark.parametrize("with_tags", [False, True])
def test_chatml_writes_calls_as_hermes_does(with_tags: bool) -> None:
    tokenizer = chatml_tokenizer(with_tags=with_tags)
    chat_format = ChatFormat("chatml", tokenizer)
    rendered = chat_format.render_training(with_tools(DIALOG, [WEATHER]))
    assert tokenizer.decode(rendered.input_ids, skip_special_tokens=False) == CHATML
    assert learned(tokenizer, rendered) == [f"{HERMES_ANSWER}<|im_end|>", "In Rome.<|im_end|>"]
    tokenizer.encode_special_tokens = False  # as other software encodes a template's text
    assert rendered.input_ids == tokenizer.encode(CHATML, add_special_tokens=False).ids
    tags = [tokenizer.token_to_id(tag) for tag in TOOL_TAGS]
    assert sum(rendered.input_ids.count(tag) for tag in tags if tag is not None) == (12 if with_tags else 0)


@pytest.mark.promise("F2", "E5")
def test_llama_3_writes_calls_as_json() -> None:
    tokenizer = llama_tokenizer(3)
    chat_format = ChatFormat("llama-3", tokenizer)
    rendered = chat_format.render_training(with_tools(DIALOG, [WEATHER]))
    assert tokenizer.decode(rendered.input_ids, skip_special_tokens=False) == LLAMA_3
    assert learned(tokenizer, rendered) == [f"{LLAMA_3_ANSWER}<|eot_id|>", "In Rome.<|eot_id|>"]
    with pytest.raises(ChatFormatError, match="first user message, but there is none"):
        chat_format.render_prompt(with_tools([Message("system", "x")], [WEATHER]))


@pytest.mark.promise("F2", "E5")
def test_llama_2_has_tools_in_its_system_prompt() -> None:
    tokenizer = llama_tokenizer(2)
    chat_format = ChatFormat("llama-2", tokenizer)
    for system in ([], [Message("system", "Be brief.")]):
        rendered = chat_format.render_training(with_tools([*system, *DIALOG], [WEATHER]))
        begins = "Be brief.\n\n" if system else ""
        turns = [Message("system", begins + HERMES_TOOLS), DIALOG[0], Message("assistant", HERMES_ANSWER)]
        results = "<tool_response>\n22\n</tool_response>\n\n<tool_response>\n19\n</tool_response>"
        assert rendered == chat_format.render_training([*turns, Message("user", results), DIALOG[-1]])


@pytest.mark.promise("F2", "E1")
@settings(deadline=None, max_examples=60)
@given(
    content=st.sampled_from(["", "Let me see.", "<tool_call>", " x "]),
    arguments=st.sampled_from(["{}", '{"a": "<tool_call>"}', '{"a": "é\\u00e9"}', '{"a', ""]),
    trained=st.booleans(),
    name=st.sampled_from(["chatml", "tags", "llama-3"]),
)
def test_prompts_are_prefixes_of_what_is_trained(content: str, arguments: str, trained: bool, name: str) -> None:
    """Whether an earlier call carries loss changes no id of it."""
    chat_format = FORMATS[name]
    call = ToolCall("get_weather", arguments)
    question = with_tools([Message("user", "x")], [WEATHER])
    dialog = [
        *question,
        Message("assistant", content, trained, tool_calls=(call,)),
        Message("tool", "</tool_response>1"),
    ]
    prompts = [chat_format.render_prompt(question), chat_format.render_prompt(dialog)]
    rendered = chat_format.render_training([*dialog, Message("assistant", "y")])
    for prompt in prompts:
        assert rendered.input_ids[: len(prompt)] == prompt
    if name == "tags":  # what is typed never becomes a tag
        begin, end_of_response = (chat_format.tag_ids[tag] for tag in ("<tool_call>", "</tool_response>"))
        ids = rendered.input_ids
        assert (ids.count(begin), ids.count(end_of_response)) == (3, 1)


FORMATS = {
    "chatml": ChatFormat("chatml", chatml_tokenizer()),
    "tags": ChatFormat("chatml", chatml_tokenizer(with_tags=True)),
    "llama-3": ChatFormat("llama-3", llama_tokenizer(3)),
}


@pytest.mark.promise("F2")
@pytest.mark.parametrize("syntax", [HERMES, LLAMA_3_JSON], ids=["hermes", "llama-3"])
@pytest.mark.parametrize("arguments", ['{"city": "Par', "", "[1]", '"x"', "nonsense", "[" * 100_000])
def test_arguments_that_are_no_object_leave_the_call_well_formed(syntax: Any, arguments: str) -> None:
    call = json.loads(syntax.body(ToolCall("f", arguments)))
    assert list(call.values()) == ["f", arguments]


@pytest.mark.promise("F2")
def test_results_stand_in_the_order_of_their_calls() -> None:
    question, answer, rome, paris, last = DIALOG
    chat_format = FORMATS["chatml"]
    expected = chat_format.render_training(DIALOG)
    assert chat_format.render_training([question, answer, paris, rome, last]) == expected
    unnamed = [question, answer, Message("tool", "22"), Message("tool", "19"), last]
    assert chat_format.render_training(unnamed) == expected


@pytest.mark.promise("F2")
@pytest.mark.parametrize(
    ("results", "index", "words"),
    [
        ([Message("tool", "1", tool_call_id="c")], 2, "'c', which is not among them: the calls before it are a, b"),
        ([DIALOG[2], DIALOG[2]], 3, "'a', which has a result already"),
        ([DIALOG[3]], 1, "the call 'a' without a result"),
        ([*DIALOG[2:4], Message("tool", "1")], 4, "only 2 calls stand before it"),
        ([Message("user", "x"), DIALOG[2]], 3, "no call stands before it"),
    ],
)
def test_a_result_belongs_to_one_call(results: list[Message], index: int, words: str) -> None:
    with pytest.raises(ChatFormatError, match=words) as exc_info:
        FORMATS["chatml"].render_training([*DIALOG[:2], *results, DIALOG[-1]])
    assert exc_info.value.message_index == index


@pytest.mark.promise("F2")
def test_the_last_calls_may_lack_a_result() -> None:
    for results in ([], [DIALOG[2]]):
        assert FORMATS["chatml"].render_prompt([*DIALOG[:2], *results, Message("user", "Go on.")])
