"""The pool of KV cache blocks: free, in use, or idle but kept for later prompts with the same prefix.

Only the bookkeeping: the forward pass reads and writes the blocks themselves. The key of a published block is a digest
of its adapter and of all tokens up to its end, so KV is never shared between adapters or their versions.
Knows nothing of sequences or tensors.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_SIZE = 32  # bytes; collisions are infeasible


def extend_block_keys(keys: list[bytes], adapter: str | None, token_ids: Sequence[int], block_size: int) -> None:
    """Append the keys of those full blocks of `token_ids` that `keys` does not cover yet.

    Args:
        keys: the result of earlier calls with a prefix of `token_ids`, or empty.
        adapter: key of an adapter version, or None for the base, whose keys never equal an adapter's.
        token_ids: all tokens of the sequence from the first on.
    """
    if len(token_ids) // block_size <= len(keys):
        return
    if keys:
        parent = keys[-1]
    elif adapter is None:
        parent = blake2b(digest_size=_DIGEST_SIZE, person=b"base").digest()
    else:
        parent = blake2b(adapter.encode(), digest_size=_DIGEST_SIZE, person=b"adapter").digest()
    new_tokens = array("i", token_ids[len(keys) * block_size :])
    stride = block_size * new_tokens.itemsize
    data = new_tokens.tobytes()
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
        """Blocks that `allocate` can return now: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    def allocate(self) -> int | None:
        """A block with one reference and undefined content; None if all blocks are in use.

        Evicts the least recently used idle block if none is free.
        """
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
        """The published blocks of the leading `keys`, up to the first key without one; takes a reference to each."""
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
        """Make a completely computed block available to `cached_prefix`; a published key keeps its first block."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Release one reference to each of a sequence's blocks.

        In reverse order, so that the head of a prefix is evicted after its tail.
        """
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if not self._num_users[block]:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
