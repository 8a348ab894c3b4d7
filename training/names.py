"""What adapters, runs and models may be called. Nothing is looked up here."""

import re
from dataclasses import dataclass

from training.errors import RegistryError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ADAPTER_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
_BASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModelId:
    """`BASE`, `BASE:ADAPTER`, `BASE:ADAPTER@VERSION` or `BASE:ADAPTER@ALIAS`."""

    base: str
    adapter: str | None = None
    ref: str | None = None

    def __str__(self) -> str:
        text = self.base
        if self.adapter is not None:
            text += f":{self.adapter}"
        if self.ref is not None:
            text += f"@{self.ref}"
        return text


def parse_model_id(text: str) -> ModelId:
    """Take a model id apart; nothing is looked up.

    Raises:
        RegistryError: it has none of the four forms.
    """
    base, colon, rest = text.partition(":")
    adapter, at, ref = rest.partition("@")
    if (
        not _BASE.fullmatch(base)
        or (colon and not ADAPTER_NAME.fullmatch(adapter))
        or (at and not ADAPTER_NAME.fullmatch(ref))
    ):
        raise RegistryError(
            f"model id {text!r:.200} is not of the form BASE, BASE:ADAPTER, BASE:ADAPTER@VERSION "
            "or BASE:ADAPTER@ALIAS: write for example smollm2-135m:ranch-hand@2"
        )
    return ModelId(base, adapter or None, ref or None)
