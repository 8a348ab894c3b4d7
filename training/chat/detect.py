"""Which chat format a base model has, told by its tokenizer's vocabulary and its own template, which is never run."""

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


# What a base model's own chat template holds if it is of this format.
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
    chosen = next((known for known in CHAT_FORMATS if known == name), None)
    if chosen is None:
        chosen = detect_chat_format(tokenizer, _chat_template(base.path))
    return ChatFormat(chosen, tokenizer, _bos_token(base.path))


def detect_chat_format(tokenizer: "Tokenizer", chat_template: str = "") -> ChatFormatName:
    """The format that the tokenizer's vocabulary tells and its chat template, if any, does not deny.

    Many chat models share Llama 2's vocabulary, and some carry the control tokens of two formats, so a
    template decides between them.

    Raises:
        ChatFormatError: no format fits, or more than one does.
    """
    known_controls = control_ids(tokenizer)
    fitting = [name for name in CHAT_FORMATS if all(token in known_controls for token in LAYOUTS[name].controls)]
    if tokenizer.token_to_id("▁[") is None and "llama-2" in fitting:
        fitting.remove("llama-2")  # <s> and </s> alone are common to many families
    if chat_template:
        found = [name for name in fitting if _TEMPLATE_MARKS[name] in chat_template]
    else:
        found = [name for name in fitting if name != "llama-2"] or fitting
    if len(found) == 1:
        return found[0]
    reason = (
        f"{' and '.join(found)} both fit"
        if found
        else f"its chat template is not of the format {' or '.join(fitting)}"
        if fitting
        else "it has the control tokens of none"
    )
    raise ChatFormatError(
        f"the chat format cannot be told from this tokenizer ({reason}): set chat_format to one of "
        f"{', '.join(CHAT_FORMATS)}"
    )


def _chat_template(path: Path) -> str:
    """The base's own template: only looked at for its marks, never run."""
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = _tokenizer_config(path).get("chat_template")
    return template if isinstance(template, str) else json.dumps(template) if template else ""


def _bos_token(path: Path) -> str | None:
    config = _tokenizer_config(path)
    token = config.get("bos_token")
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    return token if config.get("add_bos_token") is True and isinstance(token, str) else None


def _tokenizer_config(path: Path) -> dict[str, object]:
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file():
        return {}
    config: dict[str, object] = json.loads(config_file.read_text(encoding="utf-8"))
    return config
