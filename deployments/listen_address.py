"""The address at which the HTTP frontend listens, and the environment variable that passes it to HAProxy."""

import os
from dataclasses import dataclass
from pathlib import Path

BIND_VARIABLE = "CORRAL_HAPROXY_BIND"


@dataclass(frozen=True, slots=True)
class Frontend:
    """The address that clients connect to, with HTTPS if both files are given; `certfile` may contain a chain."""

    host: str
    port: int
    certfile: str | None = None
    keyfile: str | None = None

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment for `corral-haproxy`, with links to the files in `folder`, which only its owner can read."""
        bind = f"{'*' if self.host == '0.0.0.0' else self.host}:{self.port}"
        if self.certfile and self.keyfile:
            link = folder / "tls.crt"
            link.symlink_to(self.certfile)
            (folder / "tls.crt.key").symlink_to(self.keyfile)  # where HAProxy looks for a key in a separate file
            bind += f" ssl crt {link} ssl-min-ver TLSv1.2 alpn http/1.1"
        return {BIND_VARIABLE: bind}


def frontend_host() -> str | None:
    """The host at which HAProxy listens, which Ray itself does not know; None without HAProxy."""
    bind = os.environ.get(BIND_VARIABLE)
    return None if bind is None else bind.split(" ")[0].rpartition(":")[0]
