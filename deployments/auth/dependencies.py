"""Authentication as FastAPI dependencies; a route without one of them needs no key.

A key is sent as `Authorization: Bearer KEY`. Without any keys, a server that listens on loopback allows every program
on this machine to do everything. Web pages of other hosts, which a browser on this machine runs too, are refused.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers

from deployments.auth.caller import ANONYMOUS, Caller
from deployments.auth.keys import KeyStore
from deployments.auth.origin import is_foreign, is_loopback, names_loopback
from deployments.errors import InvalidKey, KeysUnreadable, MissingScope, OriginRefused
from deployments.listen_address import frontend_host

logger = logging.getLogger("ray.serve")

_BEARER = HTTPBearer(auto_error=False, description="a key from `corral keys create`; not needed if the server has none")


@functools.cache
def key_store() -> KeyStore:
    """The keys in CORRAL_HOME on this replica's node."""
    return KeyStore()


async def _store() -> KeyStore:
    return key_store()


async def _chat_caller(
    request: Request, store: Annotated[KeyStore, Depends(_store)], _: Annotated[object, Security(_BEARER)]
) -> Caller:
    with unreadable_keys_logged():
        return store.authenticate(bearer_key(request.headers)) if store.required else await anonymous(request.headers)


ChatCaller = Annotated[Caller, Depends(_chat_caller)]


async def _admin_caller(caller: ChatCaller) -> Caller:
    if "admin" not in caller.scopes:
        raise MissingScope(f"API key {caller.name!r} lacks the 'admin' scope: use a key that has it")
    return caller


AdminCaller = Annotated[Caller, Depends(_admin_caller)]


@contextlib.contextmanager
def unreadable_keys_logged() -> Iterator[None]:
    """Log why the key file cannot be read; the client learns only that it cannot."""
    try:
        yield
    except KeysUnreadable as error:
        logger.error("%s", error)
        raise KeysUnreadable("the server cannot read its API keys: its log has the cause") from None


def bearer_key(headers: Headers) -> str:
    """The key in the one Authorization header.

    Raises:
        InvalidKey: the header is missing, repeated, or does not have this form.
    """
    values = headers.getlist("authorization")
    if not values:
        raise InvalidKey("this server requires an API key: send it as 'Authorization: Bearer KEY'")
    scheme, _, key = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise InvalidKey("the Authorization header is not valid: send it once, as 'Authorization: Bearer KEY'")
    return key.strip()


async def anonymous(headers: Headers) -> Caller:
    """The caller of any request to a server without keys.

    Raises:
        InvalidKey: other machines can reach this server.
        OriginRefused: a web page of another host sent the request, or its `Host` is not a name of this machine.
    """
    if not await asyncio.to_thread(_listens_on_loopback):
        raise InvalidKey("other machines can reach this server, which has no API keys: run 'corral keys create' on it")
    if is_foreign(headers):
        raise OriginRefused("web pages of other hosts may not use a server without keys: run 'corral keys create'")
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not names_loopback(hosts[0]):
        raise OriginRefused(
            "without keys, this server can be reached as 127.0.0.1 and localhost only: run 'corral keys create'"
        )
    return ANONYMOUS


@functools.cache
def _listens_on_loopback() -> bool:
    """By the configuration of HAProxy or of Ray Serve's proxy; outside a replica nothing listens yet."""
    if (host := frontend_host()) is not None:
        return is_loopback(host)
    from ray.serve.context import _get_global_client, _get_internal_replica_context

    if _get_internal_replica_context() is None:
        return True
    client = _get_global_client()
    return client is not None and is_loopback(client.http_config.host)
