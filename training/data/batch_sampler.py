"""Which rows a worker sees in which step: packing, shuffling, and splitting a step over workers and micro-batches.

The rows of a step do not depend on the number of workers or on gradient accumulation, so the number of workers may
change between two steps of a run. The order follows from seed and epoch alone; a resumed run needs no saved state.
Knows row lengths only, neither tokens nor models.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Lengths = Sequence[int] | NDArray[np.int64]  # tokens of every row

_GROUPED_STEPS = 8  # with `group_by_length`, rows are sorted by length within a window of this many steps


def pack(lengths: Lengths, capacity: int) -> Sequence[Sequence[int]]:
    """Pack rows into packs of at most `capacity` tokens by best-fit decreasing (arXiv:2404.10830); no row is split.

    Returns lists of row numbers. Best fit needs at most 11/9 of the fewest packs possible, plus one.
    """
    return _pack(np.asarray(lengths, dtype=np.int64).tobytes(), capacity)


@lru_cache(maxsize=1)  # a process packs the same rows for its plan, its memory estimate and its training
def _pack(lengths: bytes, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens; full packs are not listed
    nonempty_bits = 0  # bit n is set where open_packs[n] is not empty
    row_lengths = np.frombuffer(lengths, dtype=np.int64)
    order = np.argsort(-row_lengths, kind="stable")
    for row, length in zip(order.tolist(), row_lengths[order].tolist(), strict=True):
        candidate_bits = nonempty_bits >> length
        if candidate_bits:
            free = length + (candidate_bits & -candidate_bits).bit_length() - 1  # the tightest fit
            number = open_packs[free].pop()
            packs[number].append(row)
            if not open_packs[free]:
                nonempty_bits ^= 1 << free
        else:
            free, number = capacity, len(packs)
            packs.append([row])
        if free > length:
            open_packs[free - length].append(number)
            nonempty_bits |= 1 << (free - length)
    return packs


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How the examples of one step are divided.

    Attributes:
        step_size: examples in a step, over all workers; an example is a row, or a pack of rows.
        num_workers: all of them get the same number of micro-batches.
        per_device: maximum examples in a micro-batch.
    """

    step_size: int
    num_workers: int
    per_device: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per worker in a full step."""
        return self.micro_batches(self.step_size)

    def micro_batches(self, num_examples: int) -> int:
        """Micro-batches per worker for a step of `num_examples`."""
        return -(-num_examples // (self.num_workers * self.per_device))


class StepBatchSampler(Sampler[list[int]]):
    """The micro-batches of one worker, each a list of row numbers; empty where a step has fewer examples than workers.

    Args:
        lengths: tokens of every row.
        examples: the rows of each example, or None where every row is an example.
        rank: of this worker, below `layout.num_workers`.
        group_by_length: put rows of similar length into the same step; a step is then less representative of the data.
    """

    def __init__(
        self,
        lengths: Lengths,
        examples: Sequence[Sequence[int]] | None,
        layout: StepLayout,
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
        self._layout, self._rank, self._seed, self._group_by_length = layout, rank, seed, group_by_length
        self._epoch = 0

    @property
    def num_steps(self) -> int:
        """Steps in an epoch; the last may be short."""
        return -(-len(self._tokens) // self._layout.step_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and with it the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        num_full, remainder = divmod(len(self._tokens), self._layout.step_size)
        return num_full * self._layout.accumulation + self._layout.micro_batches(remainder)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            parts = distribute([int(self._tokens[example]) for example in step], self._num_parts(len(step)))
            for part in parts[self._rank :: self._layout.num_workers]:
                yield [row for position in part for row in self._rows(step[position])]

    def steps(self) -> Iterator[list[int]]:
        """The examples of each step of this epoch, over all workers."""
        size = self._layout.step_size
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._tokens))
        if not self._group_by_length:
            yield from (order[start : start + size].tolist() for start in range(0, len(order), size))
            return
        steps: list[list[int]] = []
        for start in range(0, len(order), _GROUPED_STEPS * size):
            window = order[start : start + _GROUPED_STEPS * size]
            window = window[np.argsort(self._tokens[window], kind="stable")]
            steps += [window[i : i + size].tolist() for i in range(0, len(window), size)]
        full_steps = [step for step in steps if len(step) == size]
        yield from (full_steps[i] for i in random.permutation(len(full_steps)))
        yield from (step for step in steps if len(step) < size)  # at most one, and it has to come last

    def _num_parts(self, num_examples: int) -> int:
        return self._layout.num_workers * self._layout.micro_batches(num_examples)

    def _rows(self, example: int) -> Sequence[int]:
        return (example,) if self._examples is None else self._examples[example]


def distribute(tokens: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide examples into `num_parts` with about the same number of tokens and at most ceil(n / num_parts) examples.

    Longest first, each to the part with the fewest tokens (Graham's LPT). Returns sorted indices into `tokens`.
    """
    max_examples = -(-len(tokens) // num_parts)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    open_parts = [(0, part) for part in range(num_parts)]  # (tokens, part), a heap
    for position in sorted(range(len(tokens)), key=lambda position: (-tokens[position], position)):
        load, part = heapq.heappop(open_parts)
        parts[part].append(position)
        if len(parts[part]) < max_examples:
            heapq.heappush(open_parts, (load + tokens[position], part))
    return [sorted(part) for part in parts]
