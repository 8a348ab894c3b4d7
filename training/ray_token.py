"""The token of a Ray that a command of ours starts: `fit.py` and the serving side call this before `ray.init`.

Ray itself would turn tokens off where the environment says so, and write the file for everybody to read.
"""

import contextlib
import os
import secrets
from pathlib import Path


def ask_for_a_token() -> None:
    """Have the next local Ray refuse callers without the token in ~/.ray/auth_token, made here if it is not there."""
    os.environ.pop("RAY_AUTH_MODE", None)  # then a new local Ray turns tokens on
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # a home that cannot be written to: Ray says so
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(token, "x", opener=_owner_only) as file:
            file.write(secrets.token_hex(32))  # 256 bits, as Ray's own
        token.chmod(0o600)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
