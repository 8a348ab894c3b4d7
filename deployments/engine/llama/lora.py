"""The weights of LoRA adapters, one by one and stacked for batches that mix several adapters.

Every token of a batch has an adapter slot; the forward pass adds that slot's adapter and no other. Knows nothing of
which slots are in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

NO_ADAPTER = -1
_NO_OWNER = -2  # owner of the free columns of a stack
_INITIAL_COLUMNS = 16  # of a stack; doubled when it is full


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's matrices.

    Attributes:
        pairs: (layer, target) -> A [r, in_features] and B transposed [r, out_features].
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
    """

    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    scaling: float

    @property
    def max_rank(self) -> int:
        """The largest r of any layer and target."""
        return max((len(a) for a, _ in self.pairs.values()), default=1)

    @classmethod
    def from_peft(
        cls, tensors: Mapping[str, torch.Tensor], scaling: float, dtype: torch.dtype, device: torch.device
    ) -> "LoraWeights":
        """Convert tensors with PEFT's names (`base_model.model.model.layers.N.BLOCK.TARGET.lora_A.weight`).

        Raises:
            ValueError: a number is not finite in `dtype`; in a batch it could affect the answers of other adapters.
        """
        a: dict[tuple[int, str], torch.Tensor] = {}
        b: dict[tuple[int, str], torch.Tensor] = {}
        for name, tensor in tensors.items():
            parts = name.split(".")
            key = (int(parts[parts.index("layers") + 1]), parts[-3])
            is_a = parts[-2] == "lora_A"
            converted = tensor.to(dtype)
            if not torch.isfinite(converted if is_a else converted * scaling).all():
                raise ValueError(f"{name} has numbers that are not finite in {str(dtype).removeprefix('torch.')}")
            if is_a:
                a[key] = converted.to(device).contiguous()
            else:
                b[key] = converted.to(device).T.contiguous()
        return cls({key: (a[key], b[key]) for key in a}, scaling)


@dataclass(frozen=True, slots=True)
class StackedLora:
    """The tensors of `LoraStacks`; replaced by a new object whenever the address of a tensor changes.

    Attributes:
        pairs: (layer, target) -> A [columns, in_features], and B times its scaling [columns, out_features].
        owner: [columns], adapter slot of each column.
    """

    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    owner: torch.Tensor

    def owned_by(self, slots: torch.Tensor) -> torch.Tensor:
        """[num_tokens] adapter slots -> [num_tokens, columns], True for the columns of each token's own adapter."""
        return slots[:, None] == self.owner

    def add(self, key: tuple[int, str], owned: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` ([num_tokens, out_features]) plus each token's own adapter applied to `x` ([num_tokens, in_features])."""
        if key not in self.pairs:
            return y
        a, b = self.pairs[key]
        # Not a product with the mask: an infinity from another adapter's columns would become NaN.
        return y + torch.where(owned, x @ a.T, 0) @ b


class LoraStacks:
    """All loaded adapters in one stacked A and B per linear layer.

    A batch multiplies by the full A, zeroes the columns that belong to other adapters than the token's, and multiplies
    by B: exact for any mix of ranks and targets, without a loop over adapters.

    Columns are written in place and never move while their adapter is loaded: a running step uses other columns, and
    the addresses in CUDA graphs stay valid.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._columns: dict[int, list[int]] = {}  # by slot
        self._free = list(range(_INITIAL_COLUMNS))
        self.stacked = StackedLora({}, torch.full((_INITIAL_COLUMNS,), _NO_OWNER, device=device))

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or clear the slot; a running step must not be using it."""
        old_columns = self._columns.pop(slot, [])
        if old_columns:
            self.stacked.owner[old_columns] = _NO_OWNER
            self._free = sorted(self._free + old_columns)
        if weights is None:
            return
        self._make_room(weights)
        columns, self._free = self._free[: weights.max_rank], self._free[weights.max_rank :]
        for key, (a, b) in self.stacked.pairs.items():
            a[columns] = b[columns] = 0
            if key in weights.pairs:
                new_a, new_b = weights.pairs[key]
                a[columns[: len(new_a)]] = new_a
                b[columns[: len(new_b)]] = new_b * weights.scaling
        self._columns[slot] = columns
        self.stacked.owner[columns] = slot

    def _make_room(self, weights: LoraWeights) -> None:
        """Allocate larger stacks if columns or targets are missing; loaded adapters keep their columns."""
        old = self.stacked
        num_columns = len(old.owner)
        while num_columns - len(old.owner) + len(self._free) < weights.max_rank:
            num_columns *= 2
        if num_columns == len(old.owner) and weights.pairs.keys() <= old.pairs.keys():
            return
        self._free += range(len(old.owner), num_columns)
        owner = old.owner.new_full((num_columns,), _NO_OWNER)
        owner[: len(old.owner)] = old.owner
        pairs = {}
        for key, (a, b) in (weights.pairs | old.pairs).items():
            widths = a.shape[1], b.shape[1]
            new_a, new_b = (owner.new_zeros(num_columns, width, dtype=self._dtype) for width in widths)
            if key in old.pairs:
                new_a[: len(a)], new_b[: len(b)] = a, b
            pairs[key] = (new_a, new_b)
        self.stacked = StackedLora(pairs, owner)
