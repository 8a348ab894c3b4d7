"""CUDA graphs of decode steps: a forward's thousand kernel launches, recorded once for each batch size and replayed
with one call, so that small batches do not wait for Python (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/).
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import StackedLora
from deployments.engine.llama.step_tensors import StepTensors, padded

Forward = Callable[[StepTensors, StackedLora | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Recording:
    """`graph` reads the tensors of `step` and `stacked` and writes `hidden`."""

    graph: torch.cuda.CUDAGraph
    step: StepTensors
    stacked: StackedLora | None
    hidden: torch.Tensor


class DecodeGraphs:
    """The recordings of one forward: by batch size, without and with adapters.

    They are made when first needed, and those with adapters again when the stacks' addresses changed.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        device: torch.device,
        block_size: int,
        spare_block: int,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        self._forward = forward
        self._device = device
        self._block_size = block_size
        self._spare_block = spare_block
        self._max_model_len = max_model_len
        self._sizes = decode_sizes(max_num_seqs)
        self._recordings: dict[tuple[int, bool], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def hold(self, batch: ForwardBatch) -> bool:
        """Whether the batch has one token for each sequence, and not too many."""
        return len(batch.token_ids) == len(batch.block_tables) <= self._sizes[-1]

    def run(self, batch: ForwardBatch, stacked: StackedLora | None) -> torch.Tensor:
        """What `forward` gives, with rows of padding at the end; overwritten by the next call.

        Raises:
            RuntimeError: something in the forward cannot be recorded on this device.
        """
        size = self._sizes[bisect_left(self._sizes, len(batch.token_ids))]
        table_width = -(-self._max_model_len // self._block_size)
        step = StepTensors.of(padded(batch, size, table_width, self._spare_block), self._block_size)
        key = (size, stacked is not None)
        recording = self._recordings.get(key)
        if recording is None or recording.stacked is not stacked:
            if recording is not None:  # those with adapters hold stacks that are no longer used
                self._recordings = {key: kept for key, kept in self._recordings.items() if kept.stacked is None}
            recording = self._recordings[key] = self._record(step, stacked)
        recording.step.copy_(step)
        recording.graph.replay()
        return recording.hidden

    def _record(self, step: StepTensors, stacked: StackedLora | None) -> _Recording:
        step = replace(step.to(self._device), max_length=self._max_model_len)
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # libraries take their workspaces on the first call, which cannot be recorded
            self._forward(step, stacked)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may be copying an adapter to the device
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._forward(step, stacked)
        return _Recording(graph, step, stacked, hidden)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are recorded: 1, 2, 4 and multiples of 8, up to the first that holds `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, max_num_seqs + 8, 8)]
    return sizes[: bisect_left(sizes, max_num_seqs) + 1]
