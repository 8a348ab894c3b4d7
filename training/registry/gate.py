"""The gate: what must hold of an adapter before the registry publishes it.

`training.trainer.evaluate` measures, `AdapterRegistry.register` asks here. Knows no tensors and no files.
"""

import math
from collections.abc import Mapping

from training.errors import AdapterRefused


def rejection_reason(metrics: Mapping[str, float], min_improvement: float, *, changes: bool) -> str | None:
    """Why the adapter should not be published, or None; whoever knows better may force it.

    Args:
        metrics: should have `eval_loss` and `base_eval_loss`, in nats; with `parent_eval_loss`, that of the version
            which training went on from, `eval_loss` must not be above it either.
        min_improvement: how far `eval_loss` must at least be below `base_eval_loss`, in nats.
        changes: whether the adapter can change any output.
    """
    if not changes:
        return "it changes nothing, every output is the base's: train longer or with a higher learning_rate"
    missing = [key for key in ("eval_loss", "base_eval_loss") if key not in metrics]
    if missing:
        return f"its metrics lack {' and '.join(missing)}: evaluate it on held-out rows"
    tuned, plain = metrics["eval_loss"], metrics["base_eval_loss"]
    if not (math.isfinite(tuned) and math.isfinite(plain)):
        return f"its held-out loss is {tuned} and the base's {plain}: train it again"
    if not tuned <= plain - min_improvement:
        needed = f", less than {min_improvement:g} below" if min_improvement else ", above"
        return f"its held-out loss is {tuned:.4f}{needed} the base's {plain:.4f}: train longer or on other data"
    parent = metrics.get("parent_eval_loss", math.inf)
    if not tuned <= parent:
        return (
            f"its held-out loss is {tuned:.4f}, above the {parent:.4f} of the version that it continues: train with a "
            "lower learning_rate, longer or on other data"
        )
    return None


def check_evaluated(evaluated_sha256: str | None, published_sha256: str) -> None:
    """Make sure that figures belong to the weights that are published; None says nothing of where they come from.

    Raises:
        AdapterRefused: other weights were evaluated.
    """
    if evaluated_sha256 not in (None, published_sha256):
        raise AdapterRefused(
            f"the weights to publish have sha256 {published_sha256[:12]}, those that were evaluated "
            f"{str(evaluated_sha256)[:12]}: the files changed since, evaluate them again"
        )
