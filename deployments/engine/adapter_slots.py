"""Which adapter is in which slot, and how many sequences use it. Knows no weights."""

from collections import OrderedDict


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
