"""Starting a server for `corral serve` and `corral demo`: which YAML, which port, what to show, when to stop."""

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


def shipped_config(name: str) -> Path:
    """A file under `configs/`: of this checkout, else of the installed distribution.

    Raises:
        ConfigError: it is in neither place.
    """
    places = [Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "llama-corral"]
    for place in places:
        if (place / "configs" / name).is_file():
            return place / "configs" / name
    looked = " nor ".join(repr(str(place / "configs")) for place in places)
    raise ConfigError(f"configs/{name} is neither in {looked}: name a file of your own")


def read_serve_config(path: Path | None, port: int | None = None, *, tls: bool = False) -> dict[str, Any]:
    """The serve YAML at `path`, by default the quickstart's, checked, with another port if one is given.

    With `tls` it serves HTTPS: with the YAML's certificate, else with the one under CORRAL_HOME, made now if need be.
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
    """What a person who serves this should know before strangers do."""
    from deployments.config import LOOPBACK_HOSTS

    options = content.get("http_options") or {}
    host = options.get("host", RAY_HOST)
    if certfile := options.get("ssl_certfile"):
        from deployments.launch.certificates import read_certificate

        certificate = read_certificate(Path(certfile))
        return [f"{certificate.warning}: see 'corral certs'"] if certificate.warning else []
    if host in LOOPBACK_HOSTS:
        return []
    return [f"keys and conversations travel in clear to {host}:{http_address(content)[1]}: add --tls"]


def http_address(content: dict[str, Any]) -> tuple[str, int]:
    """Host and port of a serve YAML's content."""
    options = content.get("http_options") or {}
    return options.get("host", RAY_HOST), options.get("port", DEFAULT_PORT)


@contextlib.contextmanager
def serve_in_background(content: dict[str, Any], *, debug: bool = False) -> Iterator["Server"]:
    """A server that answers for as long as the block lasts; says meanwhile what is being waited for."""
    names = [app["args"]["base_model"] for app in content["applications"] if "base_model" in (app.get("args") or {})]
    with contextlib.ExitStack() as up:
        with waiting(f"loading {', '.join(names) or 'the applications'} …"):
            from deployments.launch.local_server import serving

            server = up.enter_context(serving(content, debug=debug))
        try:
            yield server
        finally:
            with waiting("stopping …"):
                up.close()


def format_urls(server: "Server", *, stays: bool = True) -> str:
    """Where a server answers, for the person who started it."""
    ui = [f"chat  {server.ui_url}"] if server.ui_url else []
    lines = [f"API   {server.url}/v1", *ui, f"docs  {server.docs_url}", f"keys  {_who_needs_a_key()}"]
    if server.certfile and Path(server.certfile).parent == corral_home() / "certs":  # no authority vouches for it
        lines.append(f"trust {server.certfile}  (corral chat --ca, curl --cacert, SSL_CERT_FILE)")
    return "\n".join([*lines, *(["Ctrl-C stops it"] if stays else [])])


@contextlib.contextmanager
def temporary_key(name: str) -> Iterator[str | None]:
    """A key to the server that this command runs, valid as long as the block lasts; None where nobody needs one."""
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    if not store.required:
        yield None
        return
    made, key = store.create(name, ("chat",), expires=datetime.now(UTC) + timedelta(days=1))
    try:
        yield key
    finally:
        store.revoke(made.id)


def _who_needs_a_key() -> str:
    from deployments.auth.keys import KeyStore

    store = KeyStore()
    if store.required:
        return f"required, {store.num_valid} valid: see 'corral keys list'"
    return "not required on this machine: 'corral keys create' changes that"


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on stderr that the block is at work: a moving line on a terminal, else a line now."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True)
        yield


def wait_for_signal() -> None:
    """Return at SIGINT (Ctrl-C) or SIGTERM."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.wait(0.5):  # a wait without limit would hold signals back on some platforms
            pass
    finally:
        for number, old in before.items():
            signal.signal(number, old)
