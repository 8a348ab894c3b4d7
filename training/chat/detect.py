"""Detects a base model's chat format from its tokenizer's vocabulary and its chat template, which is never run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat, control_ids
from training.chat.templates import CHAT_FORMATS, LAYOUTS, ChatFormatName
from training.errors import ChatFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# A string that the base model's own chat template contains if it is of this format.
_TEMPLATE_MARKS: dict[ChatFormatName, str] = {
    "llama-2": "[INST]",
    "llama-3": "<|start_header_id|>",
    "chatml": "<|im_start|>",
}


def load_chat_format(name: str, base: BaseCheckpoint, tokenizer: "Tokenizer | None" = None) -> ChatFormat:
    """The chat format `name` (`llama-2`, `llama-3`, `chatml` or `auto`) for a base model.

    Raises:
        ChatFormatError: the name is unknown, does not fit the tokenizer, or `auto` finds no single format.
    """
    if name not in CHAT_FORMATS and name != "auto":
        raise ChatFormatError(f"chat_format {name!r} is unknown: set it to auto or one of {', '.join(CHAT_FORMATS)}")
    if tokenizer is None:
        tokenizer = load_tokenizer(base)
    format_name = next((known for known in CHAT_FORMATS if known == name), None)
    if format_name is None:
        format_name = detect_chat_format(tokenizer, _chat_template(base.path))
    return ChatFormat(format_name, tokenizer, _bos_token(base.path))


def detect_chat_format(tokenizer: "Tokenizer", chat_template: str = "") -> ChatFormatName:
    """The format that fits the tokenizer's vocabulary and its chat template, if there is one.

    Many chat models share Llama 2's vocabulary, and some have the control tokens of two formats: the template decides
    between them.

    Raises:
        ChatFormatError: no format fits, or more than one does.
    """
    known_controls = control_ids(tokenizer)
    candidates = [name for name in CHAT_FORMATS if all(token in known_controls for token in LAYOUTS[name].controls)]
    if tokenizer.token_to_id("▁[") is None and "llama-2" in candidates:
        candidates.remove("llama-2")  # <s> and </s> alone are common to many families
    if chat_template:
        matches = [name for name in candidates if _TEMPLATE_MARKS[name] in chat_template]
    else:
        matches = [name for name in candidates if name != "llama-2"] or candidates
    if len(matches) == 1:
        return matches[0]
    reason = (
        f"{' and '.join(matches)} both fit"
        if matches
        else f"its chat template is not of the format {' or '.join(candidates)}"
        if candidates
        else "it lacks the control tokens of every known format"
    )
    raise ChatFormatError(
        f"the chat format cannot be detected from this tokenizer ({reason}): set chat_format to one of "
        f"{', '.join(CHAT_FORMATS)}"
    )


def _chat_template(path: Path) -> str:
    """The base's own template: searched for `_TEMPLATE_MARKS`, never run."""
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = _tokenizer_config(path).get("chat_template")
    return template if isinstance(template, str) else json.dumps(template) if template else ""


def _bos_token(path: Path) -> str | None:
    config = _tokenizer_config(path)
    token = config.get("bos_token")
    if isinstance(token, dict):  # a serialized AddedToken
        token = token.get("content")
    return token if config.get("add_bos_token") is True and isinstance(token, str) else None


def _tokenizer_config(path: Path) -> dict[str, object]:
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file():
        return {}
    config: dict[str, object] = json.loads(config_file.read_text(encoding="utf-8"))
    return config
