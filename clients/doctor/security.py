"""What `corral doctor` looks at for safety: who can read secrets here, and what answers strangers.

It sees the processes of this user (of everybody, as root) and asks those that serve HTTP whether they do it in clear.
"""

import contextlib
import importlib.util
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from clients.doctor.check import Check
from training.home import corral_home

# Under CORRAL_HOME.
_SECRETS = ("keys.json", "ui_secret", "usage.db", "usage.db-wal", "audit.jsonl", "certs", "certs/key.pem")
_HTTP = ("haproxy", "ray::ProxyActor")  # what answers Serve's clients
_RAY = ("gcs_server", "raylet", "dashboard.py", *_HTTP)
_HEAD = "gcs_server"
_START = "RAY_AUTH_MODE=token ray start --head --dashboard-host 127.0.0.1"
_PROBE_S = 2.0
_MAX_SHOWN = 3  # addresses of one program
_EXPIRY_WARNING = timedelta(days=7)


def secret_files() -> Check:
    """Everything under CORRAL_HOME that only its owner may read."""
    home = corral_home()
    modes = {path: _mode(path) for path in (home / name for name in _SECRETS) if path.exists()}
    if open_ones := [path for path, mode in modes.items() if mode & 0o077]:
        found = ", ".join(f"{path}, mode {modes[path]:04o}" for path in open_ones)
        fix = f"chmod go-rwx {' '.join(map(str, open_ones))}"
        return Check("secret files", "error", f"others can read {found}", fix)
    return Check("secret files", "ok", ", ".join(str(path.relative_to(home)) for path in modes) or "none yet")


def ray_token() -> Check:
    """The file that Ray's commands take their token from, and whether the environment turns tokens off."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists() and _mode(token) & 0o077:
        found = f"{token}, mode {_mode(token):04o}: others can read it"
        return Check("Ray's token", "error", found, f"chmod 600 {token}")
    chosen = os.environ.get("RAY_AUTH_MODE")
    if chosen is not None and chosen.lower() != "token":
        found = (
            f"RAY_AUTH_MODE={chosen}: a cluster started here runs anybody's code ('corral serve' asks for the token)"
        )
        return Check("Ray's token", "note", found, "unset RAY_AUTH_MODE, or set it to token")
    if not token.exists():
        return Check("Ray's token", "ok", f"no {token} yet: the first start of Ray writes it")
    return Check("Ray's token", "ok", f"{token}, mode {_mode(token):04o}")


def clusters() -> Check:
    """The heads of Ray clusters that run here: without a token anybody who reaches one runs code as this user."""
    heads = [process for process, name in _processes() if name == _HEAD]
    without = [process.pid for process in heads if _environment(process).get("RAY_AUTH_MODE", "").lower() != "token"]
    if without:
        found = f"a head without token authentication, pid {', '.join(map(str, without))}: who reaches it runs code"
        return Check("Ray clusters", "error", found, f"ray get-auth-token --generate, ray stop, {_START}")
    return Check("Ray clusters", "ok", f"{len(heads)} running, all ask for a token" if heads else "none running")


def open_ports() -> Check:
    """What of Ray and Serve listens beyond this machine."""
    beyond = [listener for listener in listeners() if not listener.is_loopback]
    if not beyond:
        return Check("open ports", "ok", "Ray and Serve listen on this machine's loopback addresses only")
    ports: dict[str, list[str]] = {}
    for listener in beyond:
        worker = listener.name.startswith("ray::") and listener.name not in _HTTP
        ports.setdefault("Ray's workers" if worker else listener.name, []).append(listener.address)
    found = "; ".join(f"{name} {_some(addresses)}" for name, addresses in ports.items())
    http = [listener for listener in beyond if listener.name in _HTTP]
    plain = [str(listener.port) for listener in http if speaks_plain_http(listener.reachable, listener.port)]
    if plain:
        return Check(
            "open ports", "note", found, f"keys travel in clear to port {', '.join(plain)}: corral serve --tls"
        )
    return Check("open ports", "note", found, f"let a firewall keep strangers out; a cluster's head: {_START}")


def certificate() -> Check:
    """When the certificate of `corral serve --tls` ends."""
    file = corral_home() / "certs" / "cert.pem"
    if not file.exists():
        return Check("certificate", "ok", "none yet: 'corral serve --tls' makes one")
    if importlib.util.find_spec("cryptography") is None:
        return Check("certificate", "note", f"{file} cannot be read without the package cryptography")
    from deployments.launch.certificates import read_certificate

    told = read_certificate(file)
    if told.warning:
        status: Any = "error" if told.days_left < 0 else "note"
        fix = f"move cert.pem and key.pem out of {file.parent}, then: corral certs create"
        return Check("certificate", status, told.warning, fix)
    return Check("certificate", "ok", f"{file}, until {told.not_after:%Y-%m-%d}, for {', '.join(told.hosts)}")


def api_keys() -> Check:
    """Keys that are about to end; and whether strangers need one at all."""
    from deployments.auth.keys import KeyStore

    keys = [key for key in KeyStore().list() if key.status == "valid"]
    soon = datetime.now(UTC) + _EXPIRY_WARNING
    ending = [f"{key.name!r} on {key.expires:%Y-%m-%d}" for key in keys if key.expires and key.expires <= soon]
    if ending:
        return Check("API keys", "note", f"ending within a week: {', '.join(ending)}", "corral keys create --name NAME")
    if not KeyStore().required:
        return Check("API keys", "ok", "none: everybody on this machine may use a server here, nobody else")
    return Check("API keys", "ok", f"{len(keys)} valid")


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket that a process of Ray or Serve listens on; `name` is the process's."""

    name: str
    pid: int
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self._ip.is_loopback

    @property
    def address(self) -> str:
        """As in a URL, `*` for all interfaces."""
        return f"{'*' if self._ip.is_unspecified else self.host}:{self.port}"

    @property
    def reachable(self) -> str:
        """An address of this machine that it answers at."""
        return "localhost" if self._ip.is_unspecified else self.host

    @property
    def _ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        ip = ipaddress.ip_address(self.host.partition("%")[0])  # without an interface's name
        return (ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None) or ip  # ::ffff:127.0.0.1


def listeners() -> list[Listener]:
    """Every TCP socket that Ray or Serve listens on here, as far as this user may see."""
    import psutil

    found = []
    for process, name in _processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append(Listener(name, process.pid, connection.laddr.ip, connection.laddr.port))
    return sorted(found, key=lambda listener: (listener.name, listener.port))


def speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake with who listens there succeeds."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with socket.create_connection((host, port), _PROBE_S) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def speaks_plain_http(host: str, port: int) -> bool:
    """Whether who listens there answers HTTP without TLS."""
    import httpx

    try:
        httpx.get(f"http://{f'[{host}]' if ':' in host else host}:{port}/-/healthz", timeout=_PROBE_S, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def _processes() -> Iterator[tuple[Any, str]]:
    """Processes of Ray and Serve with a short name each."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            names = [Path(word).name if "/" in word else word for word in words[:3]]  # python -u .../dashboard.py
            for name in names:
                if name in _RAY or name.startswith("ray::"):
                    yield process, name
                    break


def _some(addresses: list[str]) -> str:
    return ", ".join(addresses) if len(addresses) <= _MAX_SHOWN else f"{len(addresses)} ports"


def _environment(process: Any) -> dict[str, str]:
    import psutil

    try:
        environment: dict[str, str] = process.environ()
    except psutil.Error:  # another user's, or gone
        return {"RAY_AUTH_MODE": "token"}
    return environment


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
