"""Text for Markdown in which `<` is a `<`: the page takes out of messages what looks like an HTML tag.

`std::vector<int>`, `<div>` and `&lt;` are shown as they were typed, while code, tables and formulas stay Markdown. The
sign that keeps a `<` or `&` from beginning a tag or a character reference has no width. It is put outside code and
formulas only, so that what is copied from a code block compiles.
"""

import re

_WORD_JOINER = "\u2060"
_LITERAL = r"""
    (?:^|(?<=\n))[ ]{0,3}(?P<fence>`{3,}|~{3,})[^\n]*(?:\n|\Z) (?s:.*?)
        (?:(?<=\n)[ ]{0,3}(?P=fence)[`~]*[ ]*(?=\n|\Z)|\Z)
    | (?<!`)(?P<ticks>`+)(?!`) (?s:.+?) (?<!`)(?P=ticks)(?!`)
    | \$\$ (?s:.+?) \$\$ | \\\( (?s:.+?) \\\) | \\\[ (?s:.+?) \\\]
"""
_TAG_OR_LITERAL = re.compile(rf"(?P<literal>{_LITERAL}) | <(?=[A-Za-z/!?]) | &(?=\#?\w+;)", re.VERBOSE)


def shown(text: str) -> str:
    """The Markdown that shows a text's `<` and `&` as typed."""
    return _TAG_OR_LITERAL.sub(lambda match: match["literal"] or match[0] + _WORD_JOINER, text)


def typed(text: str) -> str:
    """The text that `shown` was given."""
    return text.replace(f"<{_WORD_JOINER}", "<").replace(f"&{_WORD_JOINER}", "&")
