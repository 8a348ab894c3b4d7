"""The gate: conditions on an adapter's metrics that must hold before it is published.

Knows nothing of tensors, files or how the metrics were measured.
"""

import math
from collections.abc import Mapping

from training.errors import AdapterRefused


def rejection_reason(metrics: Mapping[str, float], min_improvement: float, *, changes: bool) -> str | None:
    """Why the adapter should not be published, or None. Callers may override it with `force`.

    Args:
        metrics: should have `eval_loss` and `base_eval_loss`, in nats. With `parent_eval_loss`, the loss of the version
            that training continued from, `eval_loss` must not be above that either.
        min_improvement: the least difference by which `eval_loss` must be below `base_eval_loss`, in nats.
        changes: whether the adapter changes any output.
    """
    if not changes:
        return "it changes nothing, every output equals the base's: train longer or with a higher learning_rate"
    missing = [key for key in ("eval_loss", "base_eval_loss") if key not in metrics]
    if missing:
        return f"its metrics lack {' and '.join(missing)}: evaluate it on held-out rows"
    loss, base_loss = metrics["eval_loss"], metrics["base_eval_loss"]
    if not (math.isfinite(loss) and math.isfinite(base_loss)):
        return f"its held-out loss is {loss} and the base's {base_loss}: train it again"
    if not loss <= base_loss - min_improvement:
        needed = f", less than {min_improvement:g} below" if min_improvement else ", above"
        return f"its held-out loss is {loss:.4f}{needed} the base's {base_loss:.4f}: train longer or on other data"
    parent_loss = metrics.get("parent_eval_loss", math.inf)
    if not loss <= parent_loss:
        return (
            f"its held-out loss is {loss:.4f}, above the {parent_loss:.4f} of the version that it continues: "
            "train with a lower learning_rate, longer or on other data"
        )
    return None


def check_evaluated(evaluated_sha256: str | None, published_sha256: str) -> None:
    """Check that the metrics belong to the weights that are published; None if it is unknown which were evaluated.

    Raises:
        AdapterRefused: other weights were evaluated.
    """
    if evaluated_sha256 not in (None, published_sha256):
        raise AdapterRefused(
            f"the weights to publish have sha256 {published_sha256[:12]}, those that were evaluated "
            f"{str(evaluated_sha256)[:12]}: the files have changed since, evaluate them again"
        )
