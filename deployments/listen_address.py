"""Where the HTTP front end listens, and the variable that tells HAProxy's start-up so."""

import os
from dataclasses import dataclass
from pathlib import Path

BIND_VARIABLE = "CORRAL_HAPROXY_BIND"


@dataclass(frozen=True, slots=True)
class Frontend:
    """Where clients are answered, over HTTPS where there are files for it; `certfile` may hold a chain."""

    host: str
    port: int
    certfile: str | None = None
    keyfile: str | None = None

    def environment(self, folder: Path) -> dict[str, str]:
        """What tells this program of it; `folder` is readable by its owner alone and gets links to the files."""
        bind = f"{'*' if self.host == '0.0.0.0' else self.host}:{self.port}"
        if self.certfile and self.keyfile:
            linked = folder / "tls.crt"
            linked.symlink_to(self.certfile)
            (folder / "tls.crt.key").symlink_to(self.keyfile)  # where HAProxy looks for the key: no file holds both
            bind += f" ssl crt {linked} ssl-min-ver TLSv1.2 alpn http/1.1"
        return {BIND_VARIABLE: bind}


def frontend_host() -> str | None:
    """Where clients reach the HAProxy of this process's Ray, which Ray itself is not told; None where there is none."""
    bind = os.environ.get(BIND_VARIABLE)
    return None if bind is None else bind.split(" ")[0].rpartition(":")[0]
