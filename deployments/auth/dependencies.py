"""Who may call which route, as FastAPI dependencies: a route that names no caller needs no key.

A key comes as `Authorization: Bearer KEY`. Where there are no keys, everybody on this machine may do everything, which
only a server that listens on loopback allows; pages of websites, which run on this machine too, may not.
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

_BEARER = HTTPBearer(auto_error=False, description="a key of `corral keys create`; none where the server has no keys")


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
        raise MissingScope(f"the API key {caller.name!r} has not the scope 'admin': ask for one that has it")
    return caller


AdminCaller = Annotated[Caller, Depends(_admin_caller)]


@contextlib.contextmanager
def unreadable_keys_logged() -> Iterator[None]:
    """Tell the log what is wrong with the file of keys, and whoever asks only that something is."""
    try:
        yield
    except KeysUnreadable as error:
        logger.error("%s", error)
        raise KeysUnreadable("the server cannot read its API keys: its log has the cause") from None


def bearer_key(headers: Headers) -> str:
    """The key in the one Authorization header.

    Raises:
        InvalidKey: there is no such header, there are several, or it holds something else.
    """
    given = headers.getlist("authorization")
    if not given:
        raise InvalidKey("this server wants an API key: send it as 'Authorization: Bearer KEY'")
    scheme, _, key = given[0].partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise InvalidKey("the Authorization header is not understood: send it once, as 'Authorization: Bearer KEY'")
    return key.strip()


async def anonymous(headers: Headers) -> Caller:
    """Everybody, while there are no keys.

    Raises:
        InvalidKey: other machines can reach this server.
        OriginRefused: a page of another host sends this, or it asks for another name than this machine's own.
    """
    if not await asyncio.to_thread(_listens_on_loopback):
        raise InvalidKey("other machines can reach this server, and it has no API keys: run 'corral keys create' on it")
    if is_foreign(headers):
        raise OriginRefused("pages of other hosts may not use this server without a key: run 'corral keys create'")
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not names_loopback(hosts[0]):
        raise OriginRefused(
            "without keys this server answers under 127.0.0.1 and localhost only: run 'corral keys create'"
        )
    return ANONYMOUS


@functools.cache
def _listens_on_loopback() -> bool:
    """As HAProxy or Ray Serve was told; outside of them nothing listens yet."""
    if (host := frontend_host()) is not None:
        return is_loopback(host)
    from ray.serve.context import _get_global_client, _get_internal_replica_context

    if _get_internal_replica_context() is None:
        return True
    client = _get_global_client()
    return client is not None and is_loopback(client.http_config.host)
