"""Assigns adapters to slots and counts the sequences that use them. Knows nothing of weights."""

from collections import OrderedDict


class AdapterSlots:
    """Adapter keys by slot, with reference counts. Not thread-safe."""

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
        """References held by unfinished sequences."""
        return sum(self._num_users.values())

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def take(self, key: str) -> int | None:
        """Assign a slot to an adapter that is not loaded, evicting the least recently used idle one if necessary.

        None if every slot is in use.
        """
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
        """Return a reference taken by `acquire`."""
        self._num_users[key] -= 1
        if not self._num_users[key]:
            del self._num_users[key]
