"""The API as one process: the real ingress over the real model class on HTTP, without Ray between them.

For tests of what a request may do to the API, by the hundred; what Ray adds is tested on the `server` fixture.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol, cast, get_args

import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _set_internal_replica_context
from ray.serve.schema import ReplicaRank

from deployments.auth import ChatCaller
from deployments.callers import ANONYMOUS
from deployments.config import ServeArgs
from deployments.engine.request import Delta
from deployments.generation import GenerationRequest
from deployments.ingress import ChatIngress
from deployments.ledger import Ledger
from deployments.model import LlamaModel
from tests.conftest import free_port


class Model(Protocol):
    """What the ingress calls on a model replica."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]: ...

    async def ready(self) -> None: ...


class ModelHandle:
    """Calls a model in this process as Ray Serve's handle calls a replica."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def options(self, *, stream: bool) -> "ModelHandle":
        assert stream
        return self

    @property
    def generate(self) -> "_Method":
        return _Method(lambda request: _Replies(self._model.generate(request)))

    @property
    def ready(self) -> "_Method":
        return _Method(self._model.ready)


class _Method:
    def __init__(self, call: Any) -> None:
        self.remote = call


class _Replies:
    """Ray's response generator: iterates, and `cancel` ends what makes the items."""

    def __init__(self, replies: AsyncIterator[list[Delta]]) -> None:
        self._replies = cast(AsyncGenerator[list[Delta], None], replies)
        self._closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._replies

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._replies.aclose())


class LedgerHandle:
    """The same for a ledger."""

    def __init__(self) -> None:
        replica: Any = cast(serve.Deployment, Ledger).func_or_class
        self._ledger = replica()

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._ledger, name))


def load_model(args: ServeArgs) -> Any:
    """The class behind a replica, with its engine running."""
    replica: Any = cast(serve.Deployment, LlamaModel).func_or_class
    return replica(args)


async def build_api(args: ServeArgs, model: Model) -> FastAPI:
    """The ASGI application of an ingress replica; one in a process at a time."""
    replica: Any = cast(serve.Deployment, ChatIngress).func_or_class
    ingress = replica.__new__(replica)
    await ingress.__init__(ModelHandle(model), LedgerHandle(), args)
    _set_internal_replica_context(  # where the routes find their `self`
        replica_id=ReplicaID("test", DeploymentID("ChatIngress", "corral")),
        servable_object=ingress,
        _deployment_config=DeploymentConfig(),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
    # Without keys it is Ray Serve that knows whether only this machine can reach the server.
    ingress.app.dependency_overrides[get_args(ChatCaller)[1].dependency] = lambda: ANONYMOUS
    return cast(FastAPI, ingress.app)


@contextlib.contextmanager
def serving(args: ServeArgs, model: Model) -> Iterator[str]:
    """The API on a loopback port, served by a thread; yields its URL."""
    port = free_port()
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        server = uvicorn.Server(uvicorn.Config(await build_api(args, model), port=port, log_level="critical"))
        servers.append(server)
        running = asyncio.ensure_future(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        started.set()
        await running

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(timeout=60)
    yield f"http://127.0.0.1:{port}"
    servers[0].should_exit = True
    thread.join(timeout=30)
