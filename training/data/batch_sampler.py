"""Which rows a worker sees in which step: packing, shuffling, and dealing a step's rows to workers and micro-batches.

A step always has the same rows, however many workers share them and however they are accumulated, so the number of
workers may change between two steps of a run. All of it follows from seed and epoch alone; nothing is saved to resume.
`training.trainer.sft_trainer` iterates over it. Knows row lengths only, neither tokens nor models.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Lengths = Sequence[int] | NDArray[np.int64]  # tokens of every row

_GROUPED_STEPS = 8  # with `group_by_length`, rows are sorted by length within so many steps


def pack(lengths: Lengths, capacity: int) -> Sequence[Sequence[int]]:
    """Rows in as few packs of at most `capacity` tokens as best-fit decreasing finds (arXiv:2404.10830); none is split.

    Returns lists of row numbers. Best fit needs at most 11/9 of the fewest packs possible, plus one.
    """
    return _pack(np.asarray(lengths, dtype=np.int64).tobytes(), capacity)


@lru_cache(maxsize=1)  # plan, memory and trainer of a process ask for the same
def _pack(lengths: bytes, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]  # by their free tokens; full ones are in none
    some_open = 0  # bit n is set where open_packs[n] has any
    given = np.frombuffer(lengths, dtype=np.int64)
    order = np.argsort(-given, kind="stable")
    for row, length in zip(order.tolist(), given[order].tolist(), strict=True):
        roomy = some_open >> length
        if roomy:
            free = length + (roomy & -roomy).bit_length() - 1  # the least that is enough
            number = open_packs[free].pop()
            packs[number].append(row)
            if not open_packs[free]:
                some_open ^= 1 << free
        else:
            free, number = capacity, len(packs)
            packs.append([row])
        if free > length:
            open_packs[free - length].append(number)
            some_open |= 1 << (free - length)
    return packs


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the examples of one step are divided.

    Attributes:
        step_size: examples in a step, over all workers; an example is a row, or a pack of rows.
        num_workers: they see equally many micro-batches.
        per_device: the most examples of one micro-batch.
    """

    step_size: int
    num_workers: int
    per_device: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of each worker in a whole step."""
        return self.micro_batches(self.step_size)

    def micro_batches(self, num_examples: int) -> int:
        """Micro-batches of each worker that `num_examples` take."""
        return -(-num_examples // (self.num_workers * self.per_device))


class StepBatchSampler(Sampler[list[int]]):
    """The micro-batches of one worker, each a list of row numbers; empty where a step has fewer examples than workers.

    Args:
        lengths: tokens of every row.
        examples: the rows of each example, or None where every row is one.
        rank: of this worker, below `shape.num_workers`.
        group_by_length: give rows of like length to the same step; a step then tells less of the whole data.
    """

    def __init__(
        self,
        lengths: Lengths,
        examples: Sequence[Sequence[int]] | None,
        shape: StepLayout,
        rank: int,
        seed: int,
        *,
        group_by_length: bool = False,
    ) -> None:
        self._examples = examples
        if examples is None:
            self._tokens = np.asarray(lengths)
        else:
            self._tokens = np.array([sum(int(lengths[row]) for row in rows) for rows in examples])
        self._shape, self._rank, self._seed, self._grouped = shape, rank, seed, group_by_length
        self._epoch = 0

    @property
    def num_steps(self) -> int:
        """Steps of an epoch; the last may be short."""
        return -(-len(self._tokens) // self._shape.step_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self._tokens), self._shape.step_size)
        return full * self._shape.accumulation + self._shape.micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            parts = distribute([int(self._tokens[example]) for example in step], self._parts(len(step)))
            for part in parts[self._rank :: self._shape.num_workers]:
                yield [row for place in part for row in self._rows(step[place])]

    def steps(self) -> Iterator[list[int]]:
        """The examples of each step of this epoch, over all workers."""
        size = self._shape.step_size
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._tokens))
        if not self._grouped:
            yield from (order[start : start + size].tolist() for start in range(0, len(order), size))
            return
        steps: list[list[int]] = []
        for start in range(0, len(order), _GROUPED_STEPS * size):
            near = order[start : start + _GROUPED_STEPS * size]
            near = near[np.argsort(self._tokens[near], kind="stable")]
            steps += [near[i : i + size].tolist() for i in range(0, len(near), size)]
        whole = [step for step in steps if len(step) == size]
        yield from (whole[i] for i in random.permutation(len(whole)))
        yield from (step for step in steps if len(step) < size)  # at most one, and it has to come last

    def _parts(self, num_examples: int) -> int:
        return self._shape.num_workers * self._shape.micro_batches(num_examples)

    def _rows(self, example: int) -> Sequence[int]:
        return (example,) if self._examples is None else self._examples[example]


def distribute(tokens: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide examples into `num_parts` of about equally many tokens and at most ceil(n / num_parts) examples each.

    Longest first, each to the part with the fewest tokens (Graham's LPT). Returns places in `tokens`, in their order.
    """
    most = -(-len(tokens) // num_parts)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    open_parts = [(0, part) for part in range(num_parts)]  # (tokens, part), a heap
    for place in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        load, part = heapq.heappop(open_parts)
        parts[part].append(place)
        if len(parts[part]) < most:
            heapq.heappush(open_parts, (load + tokens[place], part))
    return [sorted(part) for part in parts]
