"""Composition for Ray Serve: which deployments make up the API, and which the UI.

`serve run`, `serve deploy` and `corral serve` name `deployments.app:build_app` and `deployments.app:build_ui` in
their YAML (configs/serve/).
"""

from typing import cast

from ray.serve import Application, Deployment

from deployments.config import ServeArgs, UIArgs


def build_app(args: ServeArgs) -> Application:
    """The OpenAI-compatible API: ingress in front of model replicas, and the ledger beside them."""
    from deployments.accounting.ledger import Ledger
    from deployments.api.ingress import ChatIngress
    from deployments.replica.model import LlamaModel

    ingress, ledger, model = (cast(Deployment, each) for each in (ChatIngress, Ledger, LlamaModel))
    return ingress.bind(model.bind(args), ledger.bind(), args)


def build_ui(args: UIArgs) -> Application:
    """The chat page; one replica, because Gradio keeps its sessions in process."""
    from deployments.ui.deployment import ChatUI

    return cast(Deployment, ChatUI).bind(args)
