"""How deltas are buffered: first and last at once, none lost, at a bounded rate."""

import asyncio
import time

import pytest

from deployments.engine.request import Delta
from deployments.replica.delta_buffer import DeltaBuffer


def test_the_first_comes_at_once_and_the_rest_gathers_until_the_pause_is_over() -> None:
    async def run() -> None:
        pauses = iter((0.1, 0.1, 0.0, 3600.0))
        buffer = DeltaBuffer(lambda: next(pauses))
        buffer.add([Delta([1])])
        started = time.monotonic()
        assert [d.token_ids for d in await buffer.next()] == [[1]]
        for token in (2, 3):
            buffer.add([Delta([token])])
        assert [d.token_ids for d in await buffer.next()] == [[2, 3]]
        assert time.monotonic() - started > 0.09
        await asyncio.sleep(0.15)
        for token in (4, 5):  # the pause is over: at once
            buffer.add([Delta([token])])
            assert [d.token_ids for d in await buffer.next()] == [[token]]
        buffer.add([Delta([6])])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.next(), 0.2)

    asyncio.run(run())


def test_the_end_of_an_answer_waits_for_nothing() -> None:
    async def run() -> None:
        buffer = DeltaBuffer(lambda: 60.0)
        buffer.add([Delta([1]), Delta([1], index=1)])
        await buffer.next()
        buffer.add([Delta([2]), Delta([2], index=1)])
        buffer.add([Delta([3]), Delta([3], "stop", index=1)])
        async with asyncio.timeout(30):
            assert await buffer.next() == [Delta([2, 3]), Delta([2, 3], "stop", 1)]
        buffer.add([Delta([4], "length")])
        async with asyncio.timeout(30):
            assert await buffer.next() == [Delta([4], "length")]

    asyncio.run(run())


def test_a_stream_of_many_tokens_becomes_few_chunks_and_loses_none() -> None:
    async def run() -> None:
        buffer = DeltaBuffer(lambda: 0.02)

        async def engine() -> None:
            for token in range(100):
                buffer.add([Delta([token], "length" if token == 99 else None)])
                await asyncio.sleep(0.002)

        started = time.monotonic()
        making = asyncio.create_task(engine())
        chunks = []
        while not chunks or chunks[-1].finish_reason is None:
            chunks += await buffer.next()
        await making
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(100))
        assert 2 <= len(chunks) <= (time.monotonic() - started) / 0.02 + 2

    asyncio.run(run())
