"""TLS for an HTTPS server: checks of its certificate and key files, and the SSL context of local clients.

Knows nothing of where the files come from.
"""

import ssl
import stat
from pathlib import Path

from deployments.errors import ServeConfigError


def check_tls_files(certfile: str, keyfile: str) -> None:
    """Reject files that cannot be used for HTTPS, and a key that other users can read.

    Raises:
        ServeConfigError: the message names the file and the reason.
    """
    for path in (certfile, keyfile):
        if not Path(path).is_absolute():
            raise ServeConfigError(f"{path!r} is relative, but the proxy runs elsewhere: give an absolute path")
    try:
        mode = stat.S_IMODE(Path(keyfile).stat().st_mode)
        if mode & 0o077:
            raise ServeConfigError(f"the key {keyfile!r} has mode {mode:04o}, readable by others: chmod 600 {keyfile}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as error:
        # Reasons such as KEY_VALUES_MISMATCH; for a file that is not PEM there is none.
        reason = (error.reason or "they are not PEM").replace("_", " ").lower()
        raise ServeConfigError(f"certificate {certfile!r} and key {keyfile!r} cannot be used: {reason}") from error
    except OSError as error:
        files = f"{certfile!r} or {keyfile!r}" if error.filename is None else repr(error.filename)
        raise ServeConfigError(f"{files} cannot be read: {error.strerror}") from error


def context_trusting(certfile: str) -> ssl.SSLContext:
    """SSL context for a client on the server's machine: it trusts exactly this certificate, whatever names it has."""
    context = ssl.create_default_context(cafile=certfile)
    context.check_hostname = False  # the server is reached at a loopback address, whatever its name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file may not contain a root
    return context


def _no_password() -> str:
    raise ServeConfigError(
        "the key is encrypted, and a server cannot ask for its password: store it unencrypted, with mode 0600"
    )
