"""The chat formats as jinja templates, for exported models that are served by other software.

The base's own template may differ or be missing. Corral itself does not run these templates. They give the same
tokens as our renderer, with two exceptions that a text template cannot express: other software parses control tokens
inside a message, and merges leading whitespace of a chatml answer with the line break before it.
"""

from pathlib import Path

from training.chat.default_system import DefaultSystem
from training.chat.templates import ChatFormatName


def chat_template(
    name: ChatFormatName, bos_token: str | None = None, default_system: DefaultSystem | None = None
) -> str:
    """The template of a format.

    Args:
        bos_token: prepended to chatml if the base requires it.
        default_system: what the adapter was trained with.
    """
    template = (Path(__file__).parent / "jinja" / f"{name}.jinja").read_text(encoding="utf-8")
    if default_system is not None:
        message = f"{{'role': 'system', 'content': {_literal(default_system.text)}}}"
        template = (
            f"{{%- if messages[0].role != 'system' -%}}{{%- set messages = [{message}] + messages -%}}{{%- endif -%}}\n"
            f"{{%- set system_prefix = {_literal(default_system.prefix)} -%}}\n{template}"
        )
    return (bos_token or "") + template if name == "chatml" else template


def _literal(text: str) -> str:
    for character, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escaped)
    return f"'{text}'"
