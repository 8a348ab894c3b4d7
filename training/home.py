"""`CORRAL_HOME`: the one folder Corral writes to (models, registry, runs, keys)."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def corral_home() -> Path:
    """The folder named by `CORRAL_HOME`, `~/.corral` by default; created with mode 0700."""
    home = Path(os.environ.get("CORRAL_HOME") or Path.home() / ".corral").expanduser().absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def replace_private_file(path: Path, content: bytes) -> None:
    """Put `content` in place of a file at once, readable by its owner only."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
