"""`CORRAL_HOME`: the one folder Corral writes to (models, registry, runs, keys)."""

import os
from pathlib import Path


def corral_home() -> Path:
    """The folder named by `CORRAL_HOME`, `~/.corral` by default; created with mode 0700."""
    home = Path(os.environ.get("CORRAL_HOME") or Path.home() / ".corral").expanduser().absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home
