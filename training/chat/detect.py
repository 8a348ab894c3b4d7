"""Detects a base model's chat format from its tokenizer's vocabulary and its chat template, which is never run.

Also finds the system text that the template adds.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from training.base_models.resolve import BaseCheckpoint
from training.base_models.tokenizer import load_tokenizer
from training.chat.chat_format import ChatFormat, control_ids
from training.chat.default_system import DefaultSystem, default_system_in
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


def load_chat_format(
    name: str,
    base: BaseCheckpoint,
    tokenizer: "Tokenizer | None" = None,
    *,
    default_system: str | DefaultSystem | None = None,
) -> ChatFormat:
    """The chat format `name` (`llama-2`, `llama-3`, `chatml` or `auto`) for a base model.

    Args:
        default_system: as `chat.default_system` in a configuration, or what an adapter's manifest records.

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
    if isinstance(default_system, str):
        default_system = configured_default_system(default_system, format_name, base)
    return ChatFormat(format_name, tokenizer, _bos_token(base.path), default_system)


def configured_default_system(setting: str, name: str, base: BaseCheckpoint) -> DefaultSystem | None:
    """What `chat.default_system` (`template`, `none` or a text) adds to the system texts of this base's dialogs."""
    if setting == "none":
        return None
    of_template = default_system_in(_chat_template(base.path), name)
    if setting == "template":
        return of_template
    return DefaultSystem(setting, of_template.prefix if of_template else "")


def default_system_setting(default_system: DefaultSystem | None, name: str, base: BaseCheckpoint) -> str | None:
    """The `chat.default_system` that adds this; None if there is none, because the base's chat template has changed."""
    settings = ["none", "template"]
    if default_system is not None and default_system.text.strip():
        settings.append(default_system.text)
    return next((s for s in settings if configured_default_system(s, name, base) == default_system), None)


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
    """The base's own template; its text is read, it is never run."""
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        return template_file.read_text(encoding="utf-8")
    template = _tokenizer_config(path).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: str(entry["template"]) for entry in template}
        return named.get("default") or "\n".join(named.values())
    return template if isinstance(template, str) else ""


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
