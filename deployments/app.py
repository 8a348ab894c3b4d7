"""Composition for Ray Serve: which deployments make up the API, and which the UI.

`serve run`, `serve deploy` and `corral serve` name `deployments.app:build_app` and `deployments.app:build_ui` in
their YAML (configs/serve/).
"""

from ray import serve
from ray.serve import Application

from deployments.config import ServeArgs, UIArgs


def build_app(args: ServeArgs) -> Application:
    """The OpenAI-compatible API: ingress in front of model replicas."""
    from deployments.ingress import ChatIngress
    from deployments.model import LlamaModel

    return ChatIngress.bind(LlamaModel.bind(args), args)


def build_ui(args: UIArgs) -> Application:
    """The chat page; one replica, because Gradio keeps its sessions in process."""
    from deployments.frontend import ChatUI

    return ChatUI.bind(args)
