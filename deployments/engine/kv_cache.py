"""Which blocks of the KV cache are free, in use, or idle but kept because a later prompt may begin with their tokens.

The scheduler allocates and releases; the forward reads and writes the blocks themselves. A published block is found by
a digest of its adapter and of all tokens up to its end, so KV is never shared between adapters or their versions.
Knows nothing of sequences or tensors.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_SIZE = 32  # bytes; nobody finds two prefixes with the same one


def extend_block_keys(keys: list[bytes], adapter: str | None, token_ids: Sequence[int], block_size: int) -> None:
    """Append the keys of the full blocks of `token_ids` that `keys` does not have yet.

    Args:
        keys: what earlier calls with a shorter `token_ids` appended, or empty.
        adapter: key of an adapter's version; None is the base, which no name equals.
        token_ids: the sequence from its first token.
    """
    if len(token_ids) // block_size <= len(keys):
        return
    if keys:
        parent = keys[-1]
    elif adapter is None:
        parent = blake2b(digest_size=_DIGEST_SIZE, person=b"base").digest()
    else:
        parent = blake2b(adapter.encode(), digest_size=_DIGEST_SIZE, person=b"adapter").digest()
    new = array("i", token_ids[len(keys) * block_size :])
    stride = block_size * new.itemsize
    data = new.tobytes()
    for start in range(0, len(data) - stride + 1, stride):
        parent = blake2b(parent + data[start : start + stride], digest_size=_DIGEST_SIZE, person=b"block").digest()
        keys.append(parent)


class BlockPool:
    """Reference counts of `num_blocks` blocks of `block_size` tokens. Not thread-safe."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unused, least recently used first
        self._num_users = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    def allocate(self) -> int | None:
        """A block with one reference, whatever is in it; an idle one is forgotten for it when none is free."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._published[self._keys.pop(block)]
        else:
            return None
        self._num_users[block] = 1
        return block

    def cached_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the leading `keys`, up to the first that has none, with a reference to each."""
        blocks = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            if not self._num_users[block]:
                del self._idle[block]
            self._num_users[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Make a block findable, once all of its tokens are computed. A key that another block has stays with that."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a sequence's blocks.

        The last goes first: of what then is idle, the head of a prefix outlives its tail.
        """
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if not self._num_users[block]:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
