"""The chat formats as data: the control tokens and texts that a dialog is rendered to, and which of them carry loss.

The formats are llama-2, llama-3 and chatml. Knows nothing of tokenizers and token ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from training.chat.messages import Message

ChatFormatName = Literal["llama-2", "llama-3", "chatml"]
CHAT_FORMATS: tuple[ChatFormatName, ...] = get_args(ChatFormatName)


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    control: bool = False
    trained: bool = False


def control(text: str, trained: bool = False) -> Piece:
    return Piece(text, control=True, trained=trained)


def _llama_2(messages: Sequence[Message]) -> Iterator[Piece]:
    """Meta's `llama.generation.chat_completion`: system folded into the first user turn, turns stripped."""
    system = ""
    for message in messages:
        if message.role == "system":
            system = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            yield control("<s>")
            yield Piece(f"[INST] {(system + message.content).strip()} [/INST]")
            system = ""
        else:
            yield Piece(f"{message.content.strip()} ", trained=message.learned)
            yield control("</s>", trained=message.learned)


def _llama_3(messages: Sequence[Message]) -> Iterator[Piece]:
    """Meta's `ChatFormat.encode_dialog_prompt`: a header per turn, contents stripped, no default system."""
    yield control("<|begin_of_text|>")
    for message in messages:
        yield from _llama_3_header(message.role)
        yield Piece(message.content.strip(), trained=message.learned)
        yield control("<|eot_id|>", trained=message.learned)


def _llama_3_header(role: str) -> Iterator[Piece]:
    yield control("<|start_header_id|>")
    yield Piece(role)
    yield control("<|end_header_id|>")
    yield Piece("\n\n")


def _chatml(messages: Sequence[Message]) -> Iterator[Piece]:
    """OpenAI's ChatML: contents unchanged, no default system prompt."""
    for message in messages:
        if message.role == "assistant":
            yield from _chatml_opening()
            yield Piece(message.content, trained=message.learned)
        else:
            yield control("<|im_start|>")
            yield Piece(f"{message.role}\n{message.content}")
        yield control("<|im_end|>", trained=message.learned)
        yield Piece("\n")


def _chatml_opening() -> Iterator[Piece]:
    yield control("<|im_start|>")
    yield Piece("assistant\n")


@dataclass(frozen=True, slots=True)
class Layout:
    turns: Callable[[Sequence[Message]], Iterator[Piece]]
    any_order: bool  # of roles; otherwise only what `merge_turns` returns
    opening: Callable[[], Iterator[Piece]]  # precedes the model's answer
    controls: tuple[str, ...]  # required in the tokenizer
    end_of_turn: tuple[str, ...]  # stop tokens, those that the tokenizer has
    begin_of_text: str | None  # of a plain text; None: the tokenizer's own, if it has one
    end_of_text: tuple[str, ...]  # of a plain text: the first that the tokenizer has


LAYOUTS: dict[ChatFormatName, Layout] = {
    "llama-2": Layout(_llama_2, False, lambda: iter(()), ("<s>", "</s>"), ("</s>",), "<s>", ("</s>",)),
    "llama-3": Layout(
        _llama_3,
        True,
        lambda: _llama_3_header("assistant"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "chatml": Layout(
        _chatml,
        True,
        _chatml_opening,
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
        None,
        ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"),
    ),
}
