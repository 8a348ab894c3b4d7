"""The API as one process: the real ingress over the real model class on HTTP, without Ray between them.

For tests that send requests by the hundred; what Ray adds is tested on the `server` fixture.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import uvicorn
from fastapi import FastAPI
from ray import serve

from deployments.accounting.ledger import Ledger
from deployments.api.ingress import ChatIngress
from deployments.config import ServeArgs
from deployments.responses.deployment import StoredResponses
from tests.conftest import free_port


class Handle:
    """Calls an object of this process as Ray Serve's handle calls a deployment's only replica."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def __getattr__(self, method: str) -> "_Method":
        return _Method(getattr(self._replica, method))


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        reply = self._call(*arguments)
        return Replies(reply) if isinstance(reply, AsyncGenerator) else asyncio.ensure_future(reply)


class Replies:
    """Ray's response generator: iterates, and `cancel` ends what makes the items."""

    def __init__(self, replies: AsyncGenerator[Any, None]) -> None:
        self._replies = replies
        self._closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._replies

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._replies.aclose())


def behind(deployment: Any, *arguments: Any) -> Any:
    """The object that a replica of the deployment runs."""
    return cast(serve.Deployment, deployment).func_or_class(*arguments)  # type: ignore[operator]


@contextlib.asynccontextmanager
async def running_api(args: ServeArgs, model: Any, stored: Any = None) -> AsyncIterator[FastAPI]:
    """The ASGI application of an ingress replica, with a ledger of its own; one in a process at a time.

    Args:
        stored: the owner of stored responses, by default one of its own.
    """
    replica: Any = cast(serve.Deployment, ChatIngress).func_or_class
    ingress = replica.__new__(replica)
    stored = stored or behind(StoredResponses, args.stored_responses)
    await ingress.__init__(Handle(model), Handle(behind(Ledger)), Handle(stored), args)
    context = SimpleNamespace(servable_object=ingress)  # where the routes find their `self`
    with mock.patch.object(serve, "get_replica_context", return_value=context):
        yield ingress.app
        await ingress.ledger.flush()


@contextlib.contextmanager
def serving(args: ServeArgs, model: Any, stored: Any = None) -> Iterator[str]:
    """The API on a loopback port, served by a thread; yields its URL."""
    port = free_port()
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        async with running_api(args, model, stored) as api:
            server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="critical"))
            servers.append(server)
            running = asyncio.ensure_future(server.serve())
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            started.set()
            await running

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(timeout=300)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        servers[0].should_exit = True
        thread.join(timeout=300)
