"""The security checks of `corral doctor`: who can read secrets on this machine, and what listens beyond it.

They see the processes of this user (of all users, as root), and probe those that serve HTTP for plain HTTP.
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
_SECRETS = (
    *("keys.json", "ui_secret", "usage.db", "usage.db-wal", "responses.db", "responses.db-wal", "audit.jsonl"),
    *("certs", "certs/key.pem"),
)
_HTTP = ("haproxy", "ray::ProxyActor")  # the front ends of Serve
_RAY = ("gcs_server", "raylet", "dashboard.py", *_HTTP)
_HEAD = "gcs_server"
_START = "RAY_AUTH_MODE=token ray start --head --dashboard-host 127.0.0.1"
_PROBE_S = 2.0
_MAX_SHOWN = 3  # addresses of one program
_EXPIRY_WARNING = timedelta(days=7)


def secret_files() -> Check:
    """Files under CORRAL_HOME that only their owner may read."""
    home = corral_home()
    modes = {path: _mode(path) for path in (home / name for name in _SECRETS) if path.exists()}
    if exposed := [path for path, mode in modes.items() if mode & 0o077]:
        paths = ", ".join(f"{path}, mode {modes[path]:04o}" for path in exposed)
        fix = f"chmod go-rwx {' '.join(map(str, exposed))}"
        return Check("secret files", "error", f"others can read {paths}", fix)
    return Check("secret files", "ok", ", ".join(str(path.relative_to(home)) for path in modes) or "none yet")


def ray_token() -> Check:
    """The file from which Ray's commands read their token, and whether the environment turns tokens off."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.exists() and _mode(token) & 0o077:
        summary = f"{token}, mode {_mode(token):04o}: others can read it"
        return Check("Ray's token", "error", summary, f"chmod 600 {token}")
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        summary = f"RAY_AUTH_MODE={mode}: a cluster started here runs anyone's code ('corral serve' requires the token)"
        return Check("Ray's token", "note", summary, "unset RAY_AUTH_MODE, or set it to token")
    if not token.exists():
        return Check("Ray's token", "ok", f"{token} does not exist yet: Ray writes it when it first starts")
    return Check("Ray's token", "ok", f"{token}, mode {_mode(token):04o}")


def clusters() -> Check:
    """Heads of Ray clusters on this machine: without a token, anyone who can reach one can run code as this user."""
    heads = [process for process, name in _processes() if name == _HEAD]
    unprotected = [
        process.pid for process in heads if _environment(process).get("RAY_AUTH_MODE", "").lower() != "token"
    ]
    if unprotected:
        pids = ", ".join(map(str, unprotected))
        summary = f"a head without token authentication, pid {pids}: anyone who can reach it can run code"
        return Check("Ray clusters", "error", summary, f"ray get-auth-token --generate, ray stop, {_START}")
    return Check("Ray clusters", "ok", f"{len(heads)} running, all require a token" if heads else "none running")


def open_ports() -> Check:
    """Ports of Ray and Serve that other machines can reach."""
    exposed = [listener for listener in listeners() if not listener.is_loopback]
    if not exposed:
        return Check("open ports", "ok", "Ray and Serve listen on this machine's loopback addresses only")
    ports: dict[str, list[str]] = {}
    for listener in exposed:
        worker = listener.name.startswith("ray::") and listener.name not in _HTTP
        ports.setdefault("Ray's workers" if worker else listener.name, []).append(listener.address)
    summary = "; ".join(f"{name} {_summarize(addresses)}" for name, addresses in ports.items())
    http = [listener for listener in exposed if listener.name in _HTTP]
    plain_ports = [str(listener.port) for listener in http if speaks_plain_http(listener.reachable, listener.port)]
    if plain_ports:
        fix = f"API keys are sent in cleartext to port {', '.join(plain_ports)}: corral serve --tls"
        return Check("open ports", "note", summary, fix)
    return Check("open ports", "note", summary, f"block these ports in a firewall; for a cluster's head: {_START}")


def certificate() -> Check:
    """When the certificate of `corral serve --tls` expires."""
    file = corral_home() / "certs" / "cert.pem"
    if not file.exists():
        return Check("certificate", "ok", "none yet: 'corral serve --tls' creates one")
    if importlib.util.find_spec("cryptography") is None:
        return Check("certificate", "note", f"{file} cannot be read without the package cryptography")
    from deployments.launch.certificates import read_certificate

    details = read_certificate(file)
    if details.warning:
        status: Any = "error" if details.days_left < 0 else "note"
        fix = f"move cert.pem and key.pem out of {file.parent}, then: corral certs create"
        return Check("certificate", status, details.warning, fix)
    return Check(
        "certificate", "ok", f"{file}, valid until {details.not_after:%Y-%m-%d}, for {', '.join(details.hosts)}"
    )


def api_keys() -> Check:
    """Keys that expire soon, and whether keys are required at all."""
    from deployments.auth.keys import KeyStore

    keys = [key for key in KeyStore().list() if key.status == "valid"]
    limit = datetime.now(UTC) + _EXPIRY_WARNING
    expiring = [f"{key.name!r} on {key.expires:%Y-%m-%d}" for key in keys if key.expires and key.expires <= limit]
    if expiring:
        summary = f"expiring within a week: {', '.join(expiring)}"
        return Check("API keys", "note", summary, "corral keys create --name NAME")
    if not KeyStore().required:
        return Check("API keys", "ok", "none: anyone on this machine can use its server, nobody else can")
    return Check("API keys", "ok", f"{len(keys)} valid")


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket on which a process of Ray or Serve listens; `name` is the process's."""

    name: str
    pid: int
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self._ip.is_loopback

    @property
    def address(self) -> str:
        """`HOST:PORT` as in a URL, with `*` for all interfaces."""
        return f"{'*' if self._ip.is_unspecified else self.host}:{self.port}"

    @property
    def reachable(self) -> str:
        """A host name or address at which this machine can reach it."""
        return "localhost" if self._ip.is_unspecified else self.host

    @property
    def _ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        ip = ipaddress.ip_address(self.host.partition("%")[0])  # without an interface's name
        return (ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None) or ip  # ::ffff:127.0.0.1


def listeners() -> list[Listener]:
    """All TCP sockets of Ray and Serve on this machine that listen, as far as this user may see them."""
    import psutil

    sockets = []
    for process, name in _processes():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    sockets.append(Listener(name, process.pid, connection.laddr.ip, connection.laddr.port))
    return sorted(sockets, key=lambda listener: (listener.name, listener.port))


def speaks_tls(host: str, port: int) -> bool:
    """Whether a TLS handshake succeeds there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with socket.create_connection((host, port), _PROBE_S) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def speaks_plain_http(host: str, port: int) -> bool:
    """Whether the server there answers HTTP without TLS."""
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


def _summarize(addresses: list[str]) -> str:
    return ", ".join(addresses) if len(addresses) <= _MAX_SHOWN else f"{len(addresses)} ports"


def _environment(process: Any) -> dict[str, str]:
    import psutil

    try:
        environment: dict[str, str] = process.environ()
    except psutil.Error:  # another user's process, or one that has ended: not reported
        return {"RAY_AUTH_MODE": "token"}
    return environment


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
