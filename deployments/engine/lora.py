"""LoRA adapters side by side in one batch: every loaded adapter has a slot, every token names its slot.

The A matrices of all loaded adapters are stacked into one, likewise the B matrices. A batch multiplies by the
whole stack once, zeroes the columns that belong to other tokens' adapters with a 0/1 mask, and multiplies by
the stacked B: exact for any mix, ranks may differ, no loop over adapters. Slots are taken and given back by
reference count; an adapter in use is never evicted.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

NO_ADAPTER = -1


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's matrices by (layer, target): A is [r, in_features], B is [out_features, r].

    The scaling (lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA) is already folded into B.
    """

    a: dict[tuple[int, str], torch.Tensor]
    b: dict[tuple[int, str], torch.Tensor]

    @classmethod
    def from_peft(
        cls, tensors: Mapping[str, torch.Tensor], scaling: float, dtype: torch.dtype, device: torch.device
    ) -> "LoraWeights":
        """Read PEFT's names (`base_model.model.model.layers.N.BLOCK.TARGET.lora_A.weight`)."""
        a: dict[tuple[int, str], torch.Tensor] = {}
        b: dict[tuple[int, str], torch.Tensor] = {}
        for name, tensor in tensors.items():
            parts = name.split(".")
            place = (int(parts[parts.index("layers") + 1]), parts[-3])
            if parts[-2] == "lora_A":
                a[place] = tensor.to(device, dtype)
            else:
                b[place] = (tensor.float() * scaling).to(device, dtype)
        return cls(a, b)


@dataclass(frozen=True, slots=True)
class LoraStack:
    """All loaded adapters for one linear: `a` [sum_r, in], `b` [sum_r, out], `owner` [sum_r] the column's slot."""

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor


class LoraBatch:
    """The adapters of one step: which slot each token uses. Built once a step, applied at every linear."""

    def __init__(self, stacks: dict[tuple[int, str], LoraStack], token_slots: torch.Tensor) -> None:
        self._stacks = stacks
        self._token_slots = token_slots  # [num_tokens]
        self._masks: dict[int, torch.Tensor] = {}

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` plus each token's own adapter applied to `x` ([num_tokens, in] -> [num_tokens, out])."""
        stack = self._stacks.get((layer, target))
        if stack is None:
            return y
        mask = self._masks.get(id(stack.owner))
        if mask is None:
            mask = (self._token_slots[:, None] == stack.owner).to(x.dtype)
            self._masks[id(stack.owner)] = mask
        return y + ((x @ stack.a.T) * mask) @ stack.b


class AdapterSlots:
    """The loaded adapters. Not thread-safe: the engine calls it under its own lock."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._loaded: OrderedDict[str, tuple[int, LoraWeights]] = OrderedDict()  # least recently used first
        self._num_users: dict[str, int] = {}
        self._stacks: dict[tuple[int, str], LoraStack] = {}

    @property
    def loaded(self) -> list[str]:
        """Keys of the loaded adapters, least recently used first."""
        return list(self._loaded)

    @property
    def num_in_use(self) -> int:
        """References held by sequences that have not ended."""
        return sum(self._num_users.values())

    def __contains__(self, key: str) -> bool:
        return key in self._loaded

    def load(self, key: str, weights: LoraWeights) -> bool:
        """Put an adapter into a slot, evicting the least recently used idle one; False if every slot is in use."""
        if key in self._loaded:
            return True
        if not self._free:
            idle = next((loaded for loaded in self._loaded if not self._num_users.get(loaded)), None)
            if idle is None:
                return False
            self._free.append(self._loaded.pop(idle)[0])
        self._loaded[key] = (self._free.pop(0), weights)
        self._restack()
        return True

    def unload(self, key: str) -> bool:
        """Free the slot of an idle adapter; False if it is in use or not loaded."""
        if key not in self._loaded or self._num_users.get(key):
            return False
        self._free.append(self._loaded.pop(key)[0])
        self._restack()
        return True

    def acquire(self, key: str) -> int:
        """Take a reference to a loaded adapter and return its slot."""
        slot, _ = self._loaded[key]
        self._loaded.move_to_end(key)
        self._num_users[key] = self._num_users.get(key, 0) + 1
        return slot

    def release(self, key: str) -> None:
        """Give a reference back."""
        self._num_users[key] -= 1
        if not self._num_users[key]:
            del self._num_users[key]

    def batch(self, token_slots: list[int], device: torch.device) -> LoraBatch | None:
        """What the forward applies for tokens with these slots; None when no token has an adapter."""
        if all(slot == NO_ADAPTER for slot in token_slots):
            return None
        return LoraBatch(self._stacks, torch.tensor(token_slots, device=device))

    def _restack(self) -> None:
        stacks: dict[tuple[int, str], LoraStack] = {}
        owners: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}  # places with the same columns share one owner
        for place in {place for _, weights in self._loaded.values() for place in weights.a}:
            parts = [(slot, w.a[place], w.b[place]) for slot, w in self._loaded.values() if place in w.a]
            columns = tuple((slot, a.shape[0]) for slot, a, _ in parts)
            if columns not in owners:
                slots = [slot for slot, r in columns for _ in range(r)]
                owners[columns] = torch.tensor(slots, device=parts[0][1].device)
            a = torch.cat([a for _, a, _ in parts])
            b = torch.cat([b.T for _, _, b in parts]).contiguous()
            stacks[place] = LoraStack(a, b, owners[columns])
        self._stacks = stacks
