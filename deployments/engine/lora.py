"""LoRA adapters side by side: which are loaded, who uses them, and their weights as the forward takes them.

Every token of a batch names a slot; the forward adds that slot's adapter and no other. Slots are taken and given
back by reference count; an adapter in use is never evicted.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

NO_ADAPTER = -1


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
        """Read PEFT's names (`base_model.model.model.layers.N.BLOCK.TARGET.lora_A.weight`)."""
        a: dict[tuple[int, str], torch.Tensor] = {}
        b: dict[tuple[int, str], torch.Tensor] = {}
        for name, tensor in tensors.items():
            parts = name.split(".")
            place = (int(parts[parts.index("layers") + 1]), parts[-3])
            if parts[-2] == "lora_A":
                a[place] = tensor.to(device, dtype).contiguous()
            else:
                b[place] = tensor.to(device, dtype).T.contiguous()
        return cls({place: (a[place], b[place]) for place in a}, scaling)


class AdapterSlots:
    """Which adapter is in which slot. Not thread-safe: the engine calls it under its own lock."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._num_users: dict[str, int] = {}

    @property
    def loaded(self) -> list[str]:
        """Keys of the loaded adapters, least recently used first."""
        return list(self._slots)

    @property
    def num_in_use(self) -> int:
        """References held by sequences that have not ended."""
        return sum(self._num_users.values())

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def take(self, key: str) -> int | None:
        """A slot for an adapter that is not loaded, if need be that of the one idle longest; None if all are in use."""
        if not self._free:
            idle = next((loaded for loaded in self._slots if not self._num_users.get(loaded)), None)
            if idle is None:
                return None
            self._free.append(self._slots.pop(idle))
        slot = self._slots[key] = self._free.pop(0)
        return slot

    def drop(self, key: str) -> int | None:
        """Free an idle adapter's slot and return it; None if it is in use or not loaded."""
        if key not in self._slots or self._num_users.get(key):
            return None
        slot = self._slots.pop(key)
        self._free.append(slot)
        return slot

    def acquire(self, key: str) -> int:
        """Take a reference to a loaded adapter and return its slot."""
        self._slots.move_to_end(key)
        self._num_users[key] = self._num_users.get(key, 0) + 1
        return self._slots[key]

    def release(self, key: str) -> None:
        """Give a reference back."""
        self._num_users[key] -= 1
        if not self._num_users[key]:
            del self._num_users[key]
