"""Checks of `Origin` and `Host` against requests from web pages of other hosts.

A page of any website can make the browser send requests to this machine, but it cannot choose these two headers:
`Origin` is the page's own host, and `Host` the name by which the server was reached. In a DNS rebinding attack that is
the website's own name, which was made to resolve to this machine.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a web page of another host sent the request; programs other than browsers send no `Origin`."""
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


def names_loopback(host_header: str) -> bool:
    """Whether `Host` is a loopback name or address, such as `localhost:8000` or `[::1]`."""
    try:
        host = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    return is_loopback(host) and "@" not in host_header and not set(host_header) & set("/?# \t")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback one."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
