"""Points schemathesis' requests at a served model, and keeps the answers short; loaded by its command line.

Only values of the right type are changed: what is wrong in a request stays wrong.
"""

import os
from typing import Any

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Bodies get the served model, at most two tokens, and roles in turn."""
    body = case.body
    if not isinstance(body, dict) or "model" not in body:
        return
    if isinstance(body["model"], str):
        body["model"] = os.environ["SERVED_MODEL"]
    lengths = ("max_tokens", "max_completion_tokens") if "completions" in case.path else ()
    if case.path == "/v1/responses":
        lengths = ("max_output_tokens",)
    for field in lengths:
        value = body.get(field)
        if value is None or (type(value) is int and value > 2):
            body[field] = 2
    if "prompt" in body:
        body.pop("max_completion_tokens", None)
    dialog = body.get("messages")
    if isinstance(dialog, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in dialog):
        for i, message in enumerate(dialog):
            message["role"] = ("user", "assistant")[i % 2]
        if len(dialog) % 2 == 0:
            del dialog[1:]
