"""The paths of a registry, relative to its root, and the rules for adapter and alias names."""

import difflib
import re
from collections.abc import Sequence

from training.errors import AdapterNotFound, RegistryError
from training.names import ADAPTER_NAME

PUBLISHED = re.compile(r"([^/]+)/versions/(\d{6,9})/manifest\.json")  # name, version
NUMBERED = re.compile(r"[^/]+/(?:claims|versions)/(\d{6,9})(?:/.*)?")  # a version that is claimed or has files


def version_folder(name: str, version: int) -> str:
    """The folder of one version."""
    return f"{name}/versions/{version:06d}"


def claim_path(name: str, version: int) -> str:
    """The empty file that claims a version number; kept even after the version is deleted."""
    return f"{name}/claims/{version:06d}"


def check_name(name: str, failure: type[RegistryError] = AdapterNotFound) -> None:
    """Raise `failure` unless `name` is a valid adapter name."""
    if not ADAPTER_NAME.fullmatch(name):
        raise failure(
            f"adapter name {name!r:.80} is not valid: use 1 to 63 of a-z 0-9 . _ -, starting with a letter or digit"
        )


def check_alias(alias: str) -> None:
    """Raise RegistryError unless `alias` is a valid alias name; numbers are reserved for versions."""
    if not ADAPTER_NAME.fullmatch(alias) or alias.isdecimal():
        raise RegistryError(
            f"alias {alias!r:.80} is not valid: use 1 to 63 of a-z 0-9 . _ -, starting with a letter or digit, "
            "and not a number"
        )


def suggestion(name: str, known_names: Sequence[str]) -> str:
    """What to write instead of `name`: the closest known name, or a list of them."""
    if matches := difflib.get_close_matches(name, known_names, 1, 0.5):
        return f"did you mean {matches[0]!r}?"
    return f"choose from {', '.join(known_names[:10])}" if known_names else "there are none yet"
