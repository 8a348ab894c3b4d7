"""ChatUI: the chat page as a Serve deployment, Gradio mounted in a FastAPI app.

One replica, because Gradio keeps its sessions in the process. It calls the API application by handle and keeps neither
model state nor conversations, which are in the browser.
"""

import os
from collections.abc import Awaitable
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from deployments.asgi import MAX_BODY_BYTES, BodyLimitMiddleware
from deployments.auth.caller import Caller
from deployments.auth.keys import KeyStore
from deployments.config import UIArgs
from deployments.protocol.chat import ChatCompletionRequest
from deployments.protocol.models import Model
from deployments.ui.conversations import AnswerStream, Backend
from deployments.ui.login import login_routes
from deployments.ui.page import CSS, HEAD, build_page, theme
from deployments.ui.security_headers import SameOriginMiddleware, SecurityHeadersMiddleware
from deployments.ui.sessions import SessionMiddleware, Sessions


class ServeBackend:
    """The API application by handle, looked up for each call: it may be redeployed while the page is open."""

    def __init__(self, api_app: str) -> None:
        self.api_app = api_app

    async def models(self) -> list[Model]:
        """The base and every adapter version."""
        return await cast(Awaitable[list[Model]], self._handle().models.remote())

    def chat(self, request: ChatCompletionRequest, caller: Caller) -> AnswerStream:
        """Stream a completion; `cancel()` on the stream stops the generation on the replica."""
        return cast(AnswerStream, self._handle().options(stream=True).chat.remote(request, caller))

    def _handle(self) -> DeploymentHandle[Any]:
        return serve.get_app_handle(self.api_app)


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=1000,  # every open page holds a heartbeat stream
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class ChatUI:
    """The chat page for the Serve application `UIArgs.api_app`."""

    def __init__(self, args: UIArgs) -> None:
        self._args = args

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_asgi_app(ServeBackend(self._args.api_app), KeyStore(), self._args.title)


def build_asgi_app(backend: Backend, store: KeyStore, title: str) -> FastAPI:
    """The page with login, sessions and security headers; works below any path that it is mounted on."""
    sessions = Sessions(store)
    page = _gradio_app(build_page(backend, sessions, title))
    app = FastAPI(openapi_url=None, lifespan=page.router.lifespan_context)
    app.include_router(login_routes(sessions, title))
    app.mount("/", SessionMiddleware(page, sessions))
    app.add_middleware(SameOriginMiddleware)
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=MAX_BODY_BYTES)
    app.add_middleware(SecurityHeadersMiddleware)
    return app


def _gradio_app(page: gr.Blocks) -> FastAPI:
    """Gradio's application, with features that the page does not use turned off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = FastAPI(openapi_url=None)

    @app.api_route("/gradio_api/upload", methods=["POST", "PUT"])
    async def refuse_upload() -> Response:
        return PlainTextResponse("this page does not accept files", 404)

    app.add_middleware(CORSMiddleware)  # allows no origin; without it, Gradio allows every origin
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="1kb",
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    return app
