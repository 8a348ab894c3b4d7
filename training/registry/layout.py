"""Where a registry keeps what, and what adapters and aliases may be called. Paths are relative to its root."""

import difflib
import re
from collections.abc import Sequence

from training.errors import AdapterNotFound, RegistryError
from training.names import ADAPTER_NAME

PUBLISHED = re.compile(r"([^/]+)/versions/(\d{6,9})/manifest\.json")  # name, version
NUMBERED = re.compile(r"[^/]+/(?:claims|versions)/(\d{6,9})(?:/.*)?")  # a version that is claimed or has files


def version_folder(name: str, version: int) -> str:
    """The directory of one version."""
    return f"{name}/versions/{version:06d}"


def claim_path(name: str, version: int) -> str:
    """The empty file by which a writer takes a version number, kept for good."""
    return f"{name}/claims/{version:06d}"


def check_name(name: str, failure: type[RegistryError] = AdapterNotFound) -> None:
    """Raise `failure` unless `name` is one that an adapter may have."""
    if not ADAPTER_NAME.fullmatch(name):
        raise failure(
            f"adapter name {name!r:.80} is not accepted: use 1 to 63 of a-z 0-9 . _ -, the first a letter or digit"
        )


def check_alias(alias: str) -> None:
    """Raise RegistryError unless `alias` is one that an alias may have; a number would be a version."""
    if not ADAPTER_NAME.fullmatch(alias) or alias.isdecimal():
        raise RegistryError(
            f"alias {alias!r:.80} is not accepted: use 1 to 63 of a-z 0-9 . _ -, the first a letter or digit, "
            "and not a number"
        )


def suggestion(wanted: str, known: Sequence[str]) -> str:
    """What to write instead of `wanted`: the nearest known name, or all of them."""
    if near := difflib.get_close_matches(wanted, known, 1, 0.5):
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(known[:10])}" if known else "there is none yet"
