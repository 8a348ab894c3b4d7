"""What differs between two versions of adapters: what their manifests say, and their weights.

`corral adapters diff` shows it. Weights are compared as what they add to the base, B @ A times its scaling, which does
not depend on how it is factored; the dense matrices are never built.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.registry.adapter_files import WEIGHTS_FILE, LoraParams
from training.registry.manifest import AdapterManifest

if TYPE_CHECKING:
    import torch

    Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r] times its scaling; float64

# What differs between any two versions and says nothing.
_NOT_COMPARED = {"name", "version", "files", "created", "run_name", "samples", "schema_version", "evaluated_sha256"}


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A manifest field, dotted, and its values as JSON values; None also where a side has no such field."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class WeightChange:
    """How the update of one module, or of all together, differs.

    Attributes:
        module: such as `layers.3.mlp.up_proj`; `all` is the sum over all.
        relative_change: ||W_b - W_a|| / ||W_a|| in Frobenius norms; None where W_a is zero. A side that does not adapt
            the module has W = 0 there. Computed in float64: below 1e-7 it is rounding, equal weights give 0.
        cosine: <W_a, W_b> / (||W_a|| ||W_b||); None where either is zero.
    """

    module: str
    relative_change: float | None
    cosine: float | None


@dataclass(frozen=True, slots=True)
class WeightsDiff:
    """`modules` are in the order of how much they changed."""

    overall: WeightChange
    modules: list[WeightChange]


def diff_manifests(a: AdapterManifest, b: AdapterManifest) -> list[FieldChange]:
    """The fields in which two manifests differ, in the order in which a manifest has them."""
    fields_a, fields_b = dict(_flat(_compared(a))), dict(_flat(_compared(b)))
    return [
        FieldChange(key, fields_a.get(key), fields_b.get(key))
        for key in dict.fromkeys([*fields_a, *fields_b])
        if fields_a.get(key) != fields_b.get(key)
    ]


def diff_weights(a: Path, lora_a: LoraParams, b: Path, lora_b: LoraParams) -> WeightsDiff:
    """Compare the weights in two adapter folders of one base.

    With W_x = B_x A_x, <W_x, W_y> = tr(A_x^T B_x^T B_y A_y) = tr((B_x^T B_y)(A_y A_x^T)), which takes r x r matrices
    only; ||W_b - W_a||^2 = <W_a, W_a> - 2 <W_a, W_b> + <W_b, W_b>.
    """
    factors_a, factors_b = _factors(a / WEIGHTS_FILE, lora_a.scaling), _factors(b / WEIGHTS_FILE, lora_b.scaling)
    sums = [0.0, 0.0, 0.0]
    modules = []
    for module in sorted(factors_a.keys() | factors_b.keys()):
        in_a, in_b = factors_a.get(module), factors_b.get(module)
        products = [_inner(in_a, in_a), _inner(in_a, in_b), _inner(in_b, in_b)]
        sums = [total + product for total, product in zip(sums, products, strict=True)]
        modules.append(_change(module, *products))
    modules.sort(key=lambda m: math.inf if m.relative_change is None else m.relative_change, reverse=True)
    return WeightsDiff(_change("all", *sums), modules)


def _change(module: str, aa: float, ab: float, bb: float) -> WeightChange:
    distance = math.sqrt(max(0.0, aa - 2 * ab + bb))
    return WeightChange(
        module,
        relative_change=distance / math.sqrt(aa) if aa > 0 else None,
        cosine=ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else None,
    )


def _inner(x: "Factors | None", y: "Factors | None") -> float:
    if x is None or y is None:
        return 0.0
    (a_x, b_x), (a_y, b_y) = x, y
    return float(((b_x.T @ b_y) * (a_x @ a_y.T)).sum())  # tr(P Q) is the sum over P times Q transposed


def _factors(weights: Path, scaling: float) -> dict[str, "Factors"]:
    from safetensors.torch import load_file

    tensors = load_file(weights)
    factors = {}
    for name, a in tensors.items():
        module, is_a, _ = name.partition(".lora_A.")
        if is_a:
            b = tensors[f"{module}.lora_B.weight"]
            factors[module.removeprefix("base_model.model.model.")] = a.double(), b.double() * scaling
    return factors


def _compared(manifest: AdapterManifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.model_dump(mode="json").items() if key not in _NOT_COMPARED}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_text(value: Any) -> str:
    """A field's value for a table."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
