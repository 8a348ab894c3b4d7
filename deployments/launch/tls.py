"""Certificate and key of an HTTPS server: whether they are fit to serve with, and how its own machine verifies it.

`config.py` asks the first before anything starts, `launch.py` the second. Where the files come from is not known here.
"""

import ssl
import stat
from pathlib import Path

from deployments.errors import ServeConfigError


def check_tls_files(certfile: str, keyfile: str) -> None:
    """Refuse files that HTTPS could not be served with, or a key that others can read.

    Raises:
        ServeConfigError: and its message says which file and why.
    """
    for path in (certfile, keyfile):
        if not Path(path).is_absolute():
            raise ServeConfigError(f"{path!r} is relative, and the proxy runs elsewhere: write the absolute path")
    try:
        mode = stat.S_IMODE(Path(keyfile).stat().st_mode)
        if mode & 0o077:
            raise ServeConfigError(f"the key {keyfile!r} has mode {mode:04o}: others can read it: chmod 600 {keyfile}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as error:
        # Reasons such as KEY_VALUES_MISMATCH; a file without PEM has none of them.
        reason = (error.reason or "they are not PEM").replace("_", " ").lower()
        raise ServeConfigError(f"certificate {certfile!r} and key {keyfile!r} do not go together: {reason}") from error
    except OSError as error:
        named = f"{certfile!r} or {keyfile!r}" if error.filename is None else repr(error.filename)
        raise ServeConfigError(f"{named} cannot be read: {error.strerror}") from error


def context_trusting(certfile: str) -> ssl.SSLContext:
    """For a client on the server's machine, which knows the certificate itself and needs no name in it."""
    context = ssl.create_default_context(cafile=certfile)
    context.check_hostname = False  # it is reached by a loopback address, whatever its name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file may hold no root
    return context


def _no_password() -> str:
    raise ServeConfigError(
        "the key is encrypted, and nobody is there to type its password: store it without, mode 0600"
    )
