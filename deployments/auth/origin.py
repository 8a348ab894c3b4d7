"""Whether a browser may be behind a request, and of whose page: what `auth.py` and `ui_guard.py` both ask.

A page of any website can send requests to this machine. It cannot choose the `Origin` and `Host` that its browser
writes: the first tells the page's own host, the second the name by which it reached us (which is the website's own
name where that name was made to point here, so-called DNS rebinding).
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a page of another host sends this; a program that is no browser has no `Origin`."""
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


def names_loopback(host_header: str) -> bool:
    """Whether `Host` is a name that only this machine has for itself, such as `localhost:8000` or `[::1]`."""
    try:
        host = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    return is_loopback(host) and "@" not in host_header and not set(host_header) & set("/?# \t")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this very machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
