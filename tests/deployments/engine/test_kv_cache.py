"""The pool of KV blocks: what is shared, what is kept, what is evicted first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.kv_cache import BlockPool, extend_block_keys


def block_keys(adapter: str | None, token_ids: list[int], block_size: int = 2) -> list[bytes]:
    keys: list[bytes] = []
    extend_block_keys(keys, adapter, token_ids, block_size)
    return keys


def published(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Blocks of a sequence that has computed all of them and still runs."""
    blocks = []
    for key in keys:
        block = pool.allocate()
        assert block is not None
        pool.publish(block, key)
        blocks.append(block)
    return blocks


tokens = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), max_size=12)
adapters = st.none() | st.sampled_from(["", "a", "a@v1", "a@v2", "b"])


@pytest.mark.promise("D10")
@settings(max_examples=200, deadline=None)
@given(adapters, tokens, adapters, tokens, st.integers(1, 4))
def test_keys_are_equal_exactly_where_adapter_version_and_all_tokens_up_to_there_are(
    adapter: str | None, token_ids: list[int], other: str | None, other_ids: list[int], size: int
) -> None:
    keys, other_keys = block_keys(adapter, token_ids, size), block_keys(other, other_ids, size)
    assert len(keys) == len(token_ids) // size
    for i, key in enumerate(keys):
        for j, other_key in enumerate(other_keys):
            same = i == j and adapter == other and token_ids[: (i + 1) * size] == other_ids[: (j + 1) * size]
            assert (key == other_key) == same


@settings(max_examples=100, deadline=None)
@given(adapters, tokens, st.integers(1, 4), st.data())
def test_keys_made_token_by_token_are_those_made_at_once(
    adapter: str | None, token_ids: list[int], size: int, data: st.DataObject
) -> None:
    keys: list[bytes] = []
    for end in sorted(data.draw(st.lists(st.integers(0, len(token_ids))))):
        extend_block_keys(keys, adapter, token_ids[:end], size)
    extend_block_keys(keys, adapter, token_ids, size)
    assert keys == block_keys(adapter, token_ids, size)


def test_a_pool_gives_each_block_once_and_then_none() -> None:
    pool = BlockPool(3, 2)
    blocks = [pool.allocate() for _ in range(3)]
    assert sorted(block for block in blocks if block is not None) == [0, 1, 2]
    assert pool.allocate() is None
    assert pool.num_free == 0


def test_a_prefix_is_found_up_to_the_first_block_that_differs() -> None:
    pool = BlockPool(8, 2)
    blocks = published(pool, block_keys("a", [1, 2, 3, 4, 5, 6]))
    assert pool.cached_prefix(block_keys("a", [1, 2, 3, 4, 9, 9])) == blocks[:2]
    assert pool.cached_prefix(block_keys("a", [9, 2, 3, 4, 5, 6])) == []
    assert pool.cached_prefix(block_keys(None, [1, 2, 3, 4, 5, 6])) == []


def test_an_unpublished_block_is_not_found_and_is_free_at_once_after_its_release() -> None:
    pool = BlockPool(1, 2)
    block = pool.allocate()
    assert block is not None
    assert pool.cached_prefix(block_keys(None, [1, 2])) == []
    pool.release([block])
    assert pool.allocate() == block


def test_a_shared_block_is_free_only_when_nobody_uses_it() -> None:
    pool = BlockPool(1, 2)
    keys = block_keys(None, [1, 2])
    blocks = published(pool, keys)
    assert pool.cached_prefix(keys) == blocks
    pool.release(blocks)
    assert pool.num_free == 0
    assert pool.allocate() is None
    pool.release(blocks)
    assert pool.num_free == 1


def test_a_released_prefix_is_found_until_its_blocks_are_needed() -> None:
    pool = BlockPool(2, 2)
    keys = block_keys(None, [1, 2, 3, 4])
    blocks = published(pool, keys)
    pool.release(blocks)
    assert pool.num_free == 2
    assert pool.cached_prefix(keys) == blocks
    assert pool.num_free == 0
    pool.release(blocks)
    assert {pool.allocate(), pool.allocate()} == set(blocks)
    assert pool.cached_prefix(keys) == []


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(3, 2)
    keys = block_keys(None, [1, 2, 3, 4, 5, 6])
    blocks = published(pool, keys)
    pool.release(blocks)
    assert pool.allocate() == blocks[2]
    assert pool.cached_prefix(keys) == blocks[:2]


def test_the_prefix_that_was_used_last_is_evicted_last() -> None:
    pool = BlockPool(2, 2)
    old, new = block_keys(None, [1, 2]), block_keys(None, [3, 4])
    old_blocks = published(pool, old)
    new_blocks = published(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    pool.release(pool.cached_prefix(old))
    assert pool.allocate() == new_blocks[0]
    assert pool.cached_prefix(old) == old_blocks


def test_free_blocks_are_given_before_idle_ones() -> None:
    pool = BlockPool(2, 2)
    keys = block_keys(None, [1, 2])
    blocks = published(pool, keys)
    pool.release(blocks)
    assert pool.allocate() not in blocks
    assert pool.cached_prefix(keys) == blocks


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_of_two_blocks_with_the_same_tokens_the_first_is_found(first_ends_first: bool) -> None:
    pool = BlockPool(2, 2)
    keys = block_keys(None, [1, 2])
    first = published(pool, keys)
    second = published(pool, keys)
    for blocks in (first, second) if first_ends_first else (second, first):
        pool.release(blocks)
    assert pool.num_free == 2
    assert pool.cached_prefix(keys) == first
    assert pool.num_free == 1
