"""The chat formats as data: the control tokens and texts that a dialog is rendered to, and which of them carry loss.

The formats are llama-2, llama-3 and chatml. Knows nothing of tokenizers and token ids.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from training.chat.messages import Message
from training.chat.tools import (
    HERMES,
    LLAMA_3_JSON,
    TOOL_RESPONSE_TAGS,
    CallSyntax,
    hermes_instructions,
    llama_3_instructions,
)
from training.errors import ChatFormatError

ChatFormatName = Literal["llama-2", "llama-3", "chatml"]
CHAT_FORMATS: tuple[ChatFormatName, ...] = get_args(ChatFormatName)


@dataclass(frozen=True, slots=True)
class Piece:
    """A control token or a text. A tag is a control token if the vocabulary has it, else part of the text around."""

    text: str
    control: bool = False
    trained: bool = False
    tag: bool = False


def control(text: str, trained: bool = False) -> Piece:
    return Piece(text, control=True, trained=trained)


def _tag(text: str, trained: bool = False) -> Piece:
    return Piece(text, trained=trained, tag=True)


def _llama_2(messages: Sequence[Message]) -> Iterator[Piece]:
    """Meta's `llama.generation.chat_completion`: system folded into the first user turn, turns stripped.

    Llama 2 knows no tools: it is prompted as Hermes models are.
    """
    system = ""
    for message in messages:
        if message.role == "system":
            texts = [message.content] if message.content else []
            texts += ["".join(hermes_instructions(message.tools))] if message.tools else []
            system = "<<SYS>>\n{}\n<</SYS>>\n\n".format("\n\n".join(texts))
        elif message.role == "user":
            yield control("<s>")
            yield Piece(f"[INST] {(system + message.content).strip()} [/INST]")
            system = ""
        else:
            yield Piece(f"{message.content.strip()} ", trained=message.learned)
            yield control("</s>", trained=message.learned)


def _llama_3(messages: Sequence[Message]) -> Iterator[Piece]:
    """Meta's `ChatFormat.encode_dialog_prompt`: a header per turn, contents stripped.

    With tools as in the chat template of Llama 3.1.
    """
    yield control("<|begin_of_text|>")
    instructions = ""
    for message in messages:
        role, content = str(message.role), message.prefix + message.content.strip()
        if message.tools:
            if all(other.role != "user" for other in messages):
                raise ChatFormatError("llama-3 lists tools in the first user message, but there is none: add one")
            instructions = llama_3_instructions(message.tools)
            content = f"Environment: ipython\n{content}"
        elif message.tool_calls:
            content = LLAMA_3_JSON.answer(content, message.tool_calls)
        elif role == "user":
            content, instructions = instructions + content, ""
        elif role == "tool":
            role, content = "ipython", json.dumps(message.content, ensure_ascii=False)
        yield from _llama_3_header(role)
        yield Piece(content, trained=message.learned)
        yield control("<|eot_id|>", trained=message.learned)


def _llama_3_header(role: str) -> Iterator[Piece]:
    yield control("<|start_header_id|>")
    yield Piece(role)
    yield control("<|end_header_id|>")
    yield Piece("\n\n")


def _chatml(messages: Sequence[Message]) -> Iterator[Piece]:
    """OpenAI's ChatML: contents unchanged. With tools as in Qwen2.5's chat template."""
    for is_result, group in itertools.groupby(messages, lambda message: message.role == "tool"):
        if is_result:
            yield from _chatml_results(group)
            continue
        for message in group:
            if message.role == "assistant":
                yield from _chatml_opening()
                yield from _chatml_answer(message)
            else:
                yield control("<|im_start|>")
                yield from _chatml_system(message) if message.tools else [Piece(f"{message.role}\n{message.content}")]
            yield control("<|im_end|>", trained=message.learned)
            yield Piece("\n")


def _chatml_system(message: Message) -> Iterator[Piece]:
    yield Piece(f"system\n{message.content}\n\n" if message.content else "system\n")
    for text in hermes_instructions(message.tools):
        yield _tag(text)


def _chatml_answer(message: Message) -> Iterator[Piece]:
    trained = message.learned
    yield Piece(message.content, trained=trained)
    for index, call in enumerate(message.tool_calls):
        yield _tag(HERMES.separator if index or message.content else "", trained)
        yield _tag(HERMES.begin_tag, trained)
        yield Piece(HERMES.body(call), trained=trained)
        yield _tag(HERMES.end_tag, trained)


def _chatml_results(messages: Iterable[Message]) -> Iterator[Piece]:
    """The results of an answer's calls, in one user turn."""
    begin, end = TOOL_RESPONSE_TAGS
    yield control("<|im_start|>")
    yield Piece("user")
    for message in messages:
        yield _tag("\n")
        yield _tag(begin)
        yield Piece(f"\n{message.content}\n")
        yield _tag(end)
    yield control("<|im_end|>")
    yield Piece("\n")


def _chatml_opening() -> Iterator[Piece]:
    yield control("<|im_start|>")
    yield Piece("assistant\n")


@dataclass(frozen=True, slots=True)
class Layout:
    turns: Callable[[Sequence[Message]], Iterator[Piece]]
    call_syntax: CallSyntax
    any_order: bool  # of roles; otherwise only what `merge_turns` returns
    opening: Callable[[], Iterator[Piece]]  # precedes the model's answer
    controls: tuple[str, ...]  # required in the tokenizer
    end_of_turn: tuple[str, ...]  # stop tokens, those that the tokenizer has
    begin_of_text: str | None  # of a plain text; None: the tokenizer's own, if it has one
    end_of_text: tuple[str, ...]  # of a plain text: the first that the tokenizer has


LAYOUTS: dict[ChatFormatName, Layout] = {
    "llama-2": Layout(_llama_2, HERMES, False, lambda: iter(()), ("<s>", "</s>"), ("</s>",), "<s>", ("</s>",)),
    "llama-3": Layout(
        _llama_3,
        LLAMA_3_JSON,
        True,
        lambda: _llama_3_header("assistant"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "chatml": Layout(
        _chatml,
        HERMES,
        True,
        _chatml_opening,
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
        None,
        ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"),
    ),
}
