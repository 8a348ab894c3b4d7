"""LoRA adapters side by side: which are loaded, who uses them, and their weights as the forward takes them.

Every token of a batch names a slot; the forward adds that slot's adapter and no other. Slots are taken and given
back by reference count; an adapter in use is never evicted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

NO_ADAPTER = -1
_NOBODY = -2  # owns the empty columns of a stack
_FIRST_COLUMNS = 16  # of a stack; they double when they do not suffice


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's matrices.

    Attributes:
        pairs: by (layer, target): A [r, in_features] and B transposed [r, out_features].
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
    """

    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    scaling: float

    @property
    def max_rank(self) -> int:
        """The largest r."""
        return max((len(a) for a, _ in self.pairs.values()), default=1)

    @classmethod
    def from_peft(
        cls, tensors: Mapping[str, torch.Tensor], scaling: float, dtype: torch.dtype, device: torch.device
    ) -> "LoraWeights":
        """Read PEFT's names (`base_model.model.model.layers.N.BLOCK.TARGET.lora_A.weight`).

        Raises:
            ValueError: a number is not finite in `dtype`; beside other adapters it could reach their answers.
        """
        a: dict[tuple[int, str], torch.Tensor] = {}
        b: dict[tuple[int, str], torch.Tensor] = {}
        for name, tensor in tensors.items():
            parts = name.split(".")
            place = (int(parts[parts.index("layers") + 1]), parts[-3])
            is_a = parts[-2] == "lora_A"
            converted = tensor.to(dtype)
            if not torch.isfinite(converted if is_a else converted * scaling).all():
                raise ValueError(f"{name} has numbers that are not finite in {str(dtype).removeprefix('torch.')}")
            if is_a:
                a[place] = converted.to(device).contiguous()
            else:
                b[place] = converted.to(device).T.contiguous()
        return cls({place: (a[place], b[place]) for place in a}, scaling)


@dataclass(frozen=True, slots=True)
class StackedLora:
    """The tensors of `LoraStacks`; another object whenever an address in it changes.

    Attributes:
        pairs: by (layer, target): A [columns, in_features], and B times its scaling [columns, out_features].
        owner: [columns], the adapter slot that each belongs to.
    """

    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    owner: torch.Tensor

    def owned_by(self, slots: torch.Tensor) -> torch.Tensor:
        """[num_tokens] adapter slots -> [num_tokens, columns], whether the column is of the token's adapter."""
        return slots[:, None] == self.owner

    def add(self, place: tuple[int, str], owned: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` ([num_tokens, out_features]) plus each token's own adapter applied to `x` ([num_tokens, in_features])."""
        if place not in self.pairs:
            return y
        a, b = self.pairs[place]
        # Not a product with the mask: infinity of one token's adapter would reach its neighbours.
        return y + torch.where(owned, x @ a.T, 0) @ b


class LoraStacks:
    """All loaded adapters, one A and one B for each linear: multiply by the whole stack, zero the columns of other
    tokens' adapters, multiply back. Exact for any mix of ranks and targets, without a loop over adapters.

    An adapter's columns stay where they are while it is loaded and are written in place: the step that runs meanwhile
    uses other columns, and CUDA graphs keep their addresses.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._columns: dict[int, list[int]] = {}  # by slot
        self._free = list(range(_FIRST_COLUMNS))
        self.stacked = StackedLora({}, torch.full((_FIRST_COLUMNS,), _NOBODY, device=device))

    def put(self, slot: int, weights: LoraWeights | None) -> None:
        """Put an adapter into a slot, or empty it; no running step may use that slot."""
        emptied = self._columns.pop(slot, [])
        if emptied:
            self.stacked.owner[emptied] = _NOBODY
            self._free = sorted(self._free + emptied)
        if weights is None:
            return
        self._make_room(weights)
        columns, self._free = self._free[: weights.max_rank], self._free[weights.max_rank :]
        for place, (a, b) in self.stacked.pairs.items():
            a[columns] = b[columns] = 0
            if place in weights.pairs:
                new_a, new_b = weights.pairs[place]
                a[columns[: len(new_a)]] = new_a
                b[columns[: len(new_b)]] = new_b * weights.scaling
        self._columns[slot] = columns
        self.stacked.owner[columns] = slot

    def _make_room(self, weights: LoraWeights) -> None:
        """New stacks where columns or targets are missing, with everything at the columns where it was."""
        old = self.stacked
        num_columns = len(old.owner)
        while num_columns - len(old.owner) + len(self._free) < weights.max_rank:
            num_columns *= 2
        if num_columns == len(old.owner) and weights.pairs.keys() <= old.pairs.keys():
            return
        self._free += range(len(old.owner), num_columns)
        owner = old.owner.new_full((num_columns,), _NOBODY)
        owner[: len(old.owner)] = old.owner
        pairs = {}
        for place, (a, b) in (weights.pairs | old.pairs).items():
            widths = a.shape[1], b.shape[1]
            new_a, new_b = (owner.new_zeros(num_columns, width, dtype=self._dtype) for width in widths)
            if place in old.pairs:
                new_a[: len(a)], new_b[: len(b)] = a, b
            pairs[place] = (new_a, new_b)
        self.stacked = StackedLora(pairs, owner)
