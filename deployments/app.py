"""The Ray Serve applications: the deployments of the API, and those of the UI.

Serve YAMLs (configs/serve/) refer to them as `deployments.app:build_app` and `deployments.app:build_ui`.
"""

from typing import cast

from ray.serve import Application, Deployment

from deployments.config import ServeArgs, UIArgs


def build_app(args: ServeArgs) -> Application:
    """The OpenAI-compatible API: the ingress, the model replicas behind it, the ledger and the stored responses."""
    from deployments.accounting.ledger import Ledger
    from deployments.api.ingress import ChatIngress
    from deployments.replica.model import LlamaModel
    from deployments.responses.deployment import StoredResponses

    deployments = (ChatIngress, Ledger, LlamaModel, StoredResponses)
    ingress, ledger, model, responses = (cast(Deployment, each) for each in deployments)
    return ingress.bind(model.bind(args), ledger.bind(), responses.bind(args.stored_responses), args)


def build_ui(args: UIArgs) -> Application:
    """The chat page; a single replica, because Gradio keeps its sessions in the process."""
    from deployments.ui.deployment import ChatUI

    return cast(Deployment, ChatUI).bind(args)
