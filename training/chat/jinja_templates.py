"""The chat formats as jinja templates, for exported models that are served by other software.

The base's own template may differ (it may add a system prompt that the adapter was not trained with) or be missing.
Corral itself does not run these templates. They give the same tokens as our renderer, with two exceptions that a text
template cannot express: other software parses control tokens inside a message, and merges leading whitespace of a
chatml answer with the line break before it.
"""

from pathlib import Path

from training.chat.templates import ChatFormatName


def chat_template(name: ChatFormatName, bos_token: str | None = None) -> str:
    """The template of a format; `bos_token` is prepended to chatml if the base requires it."""
    template = (Path(__file__).parent / "jinja" / f"{name}.jinja").read_text(encoding="utf-8")
    return (bos_token or "") + template if name == "chatml" else template
