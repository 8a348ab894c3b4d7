"""How deltas gather on their way: first and last at once, none lost, no more than so many in a second."""

import asyncio
import time

import pytest

from deployments.engine.request import Delta
from deployments.replica.delta_buffer import Postbox


def test_the_first_comes_at_once_and_the_rest_gathers_until_the_pause_is_over() -> None:
    async def run() -> None:
        pauses = iter((0.1, 0.1, 0.0, 3600.0))
        postbox = Postbox(lambda: next(pauses))
        postbox.put([Delta([1])])
        started = time.monotonic()
        assert [d.token_ids for d in await postbox.take()] == [[1]]
        for token in (2, 3):
            postbox.put([Delta([token])])
        assert [d.token_ids for d in await postbox.take()] == [[2, 3]]
        assert time.monotonic() - started > 0.09
        await asyncio.sleep(0.15)
        for token in (4, 5):  # the pause is over: at once
            postbox.put([Delta([token])])
            assert [d.token_ids for d in await postbox.take()] == [[token]]
        postbox.put([Delta([6])])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(postbox.take(), 0.2)

    asyncio.run(run())


def test_the_end_of_an_answer_waits_for_nothing() -> None:
    async def run() -> None:
        postbox = Postbox(lambda: 60.0)
        postbox.put([Delta([1]), Delta([1], index=1)])
        await postbox.take()
        postbox.put([Delta([2]), Delta([2], index=1)])
        postbox.put([Delta([3]), Delta([3], "stop", index=1)])
        async with asyncio.timeout(30):
            assert await postbox.take() == [Delta([2, 3]), Delta([2, 3], "stop", 1)]
        postbox.put([Delta([4], "length")])
        async with asyncio.timeout(30):
            assert await postbox.take() == [Delta([4], "length")]

    asyncio.run(run())


def test_a_stream_of_many_tokens_becomes_few_chunks_and_loses_none() -> None:
    async def run() -> None:
        postbox = Postbox(lambda: 0.02)

        async def engine() -> None:
            for token in range(100):
                postbox.put([Delta([token], "length" if token == 99 else None)])
                await asyncio.sleep(0.002)

        started = time.monotonic()
        making = asyncio.create_task(engine())
        chunks = []
        while not chunks or chunks[-1].finish_reason is None:
            chunks += await postbox.take()
        await making
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(100))
        assert 2 <= len(chunks) <= (time.monotonic() - started) / 0.02 + 2

    asyncio.run(run())
