"""A Corral server on this machine for the commands that run one: its YAML and port, what to print, when to stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError
from training.home import corral_home

if TYPE_CHECKING:
    from deployments.launch.local_server import Server

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
RAY_HOST = "0.0.0.0"  # Ray's default where a YAML names none
WILDCARD_HOSTS = (RAY_HOST, "::")
RUNNING_NOTICE = "The server keeps running in this terminal. Press Ctrl-C to stop it."


def shipped_config(name: str) -> Path:
    """The path of a file under `configs/`: in this checkout, else in the installed distribution.

    Raises:
        ConfigError: it exists in neither.
    """
    roots = [Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "llama-corral"]
    for root in roots:
        if (root / "configs" / name).is_file():
            return root / "configs" / name
    searched = " or ".join(repr(str(root / "configs")) for root in roots)
    raise ConfigError(f"configs/{name} was not found in {searched}: give a file of your own")


def read_serve_config(path: Path | None, port: int | None = None, *, tls: bool = False) -> dict[str, Any]:
    """Load and check the serve YAML at `path` (default: the quickstart's); `port` overrides the YAML's.

    With `tls`, the server uses HTTPS: with the YAML's certificate, else with the one under CORRAL_HOME, created if
    missing.
    """
    from deployments.config import check_serve_config, load_serve_config

    content = load_serve_config(path or shipped_config("serve/quickstart.yaml"))
    if port is not None:
        content.setdefault("http_options", {})["port"] = port
    options = content.setdefault("http_options", {})
    if tls and "ssl_certfile" not in options:
        from deployments.launch.certificates import certificate_files, create_certificate

        certificate, key = certificate_files()
        if not certificate.exists():
            host = options.get("host", RAY_HOST)
            create_certificate([] if host in WILDCARD_HOSTS else [host])
        options |= {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
        check_serve_config(content, "--tls")
    return content


def startup_warnings(content: dict[str, Any]) -> list[str]:
    """Security warnings about a serve YAML: a certificate that needs attention, or plain HTTP beyond loopback."""
    from deployments.config import LOOPBACK_HOSTS

    options = content.get("http_options") or {}
    host = options.get("host", RAY_HOST)
    if certfile := options.get("ssl_certfile"):
        from deployments.launch.certificates import read_certificate

        certificate = read_certificate(Path(certfile))
        return [f"{certificate.warning}: see 'corral certs'"] if certificate.warning else []
    if host in LOOPBACK_HOSTS:
        return []
    return [f"API keys and conversations are sent in cleartext to {host}:{http_address(content)[1]}: add --tls"]


def http_address(content: dict[str, Any]) -> tuple[str, int]:
    """Host and port of a serve YAML's content."""
    options = content.get("http_options") or {}
    return options.get("host", RAY_HOST), options.get("port", DEFAULT_PORT)


@contextlib.contextmanager
def serve_in_background(content: dict[str, Any], *, debug: bool = False) -> Iterator["Server"]:
    """Run a server until the block ends; its start and stop are shown on stderr."""
    names = [app["args"]["base_model"] for app in content["applications"] if "base_model" in (app.get("args") or {})]
    with contextlib.ExitStack() as stack:
        with show_status(f"loading {', '.join(names) or 'the applications'} …"):
            from deployments.launch.local_server import serving

            server = stack.enter_context(serving(content, debug=debug))
        try:
            yield server
        finally:
            with show_status("stopping …"):
                stack.close()


def format_urls(server: "Server") -> str:
    """The addresses of a server, and whether requests need a key, one per line."""
    ui = [f"chat  {server.ui_url}"] if server.ui_url else []
    lines = [f"API   {server.url}/v1", *ui, f"docs  {server.docs_url}", f"keys  {_key_summary()}"]
    if server.certfile and Path(server.certfile).parent == corral_home() / "certs":  # self-signed
        lines.append(f"trust {server.certfile}  (corral chat --ca, curl --cacert, SSL_CERT_FILE)")
    return "\n".join(lines)


@contextlib.contextmanager
def temporary_key(name: str) -> Iterator[str | None]:
    """An API key for a server on this machine, revoked when the block ends; None if no key is required."""
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    if not store.required:
        yield None
        return
    record, key = store.create(name, ("chat",), expires=datetime.now(UTC) + timedelta(days=1))
    try:
        yield key
    finally:
        store.revoke(record.id)


def _key_summary() -> str:
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    if store.required:
        return f"required, {store.num_valid} valid: see 'corral keys list'"
    return "not required on this machine: 'corral keys create' changes that"


@contextlib.contextmanager
def show_status(text: str) -> Iterator[None]:
    """Show `text` on stderr while the block runs: with a spinner on a terminal, else as one line."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield


def wait_for_signal() -> None:
    """Block until SIGINT (Ctrl-C) or SIGTERM."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.wait(0.5):  # an unbounded wait delays signals on some platforms
            pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
