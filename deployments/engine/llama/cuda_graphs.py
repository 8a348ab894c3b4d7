"""CUDA graphs of decode steps.

The thousand kernel launches of a forward pass are captured once per batch size and replayed with one call, so that
small batches are not bound by Python (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/).
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import StackedLora
from deployments.engine.llama.step_tensors import StepTensors, pad_batch

Forward = Callable[[StepTensors, StackedLora | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _CapturedGraph:
    """A captured graph, which reads the tensors of `step` and `stacked` and writes `hidden`."""

    graph: torch.cuda.CUDAGraph
    step: StepTensors
    stacked: StackedLora | None
    hidden: torch.Tensor


class DecodeGraphs:
    """The captured graphs of one forward pass, by batch size, with and without adapters.

    Graphs are captured on first use; those with adapters again whenever the addresses of the stacks change.
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
        self._graphs: dict[tuple[int, bool], _CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def supports(self, batch: ForwardBatch) -> bool:
        """Whether a graph fits the batch: one token per sequence, and no more sequences than the largest size."""
        return len(batch.token_ids) == len(batch.block_tables) <= self._sizes[-1]

    def run(self, batch: ForwardBatch, stacked: StackedLora | None) -> torch.Tensor:
        """The result of `forward`, followed by rows of padding; the next call overwrites it.

        Raises:
            RuntimeError: the forward pass cannot be captured on this device.
        """
        size = self._sizes[bisect_left(self._sizes, len(batch.token_ids))]
        table_width = -(-self._max_model_len // self._block_size)
        step = StepTensors.of(pad_batch(batch, size, table_width, self._spare_block), self._block_size)
        key = (size, stacked is not None)
        captured = self._graphs.get(key)
        if captured is None or captured.stacked is not stacked:
            if captured is not None:  # all graphs with adapters use the old stacks
                self._graphs = {key: graph for key, graph in self._graphs.items() if graph.stacked is None}
            captured = self._graphs[key] = self._capture(step, stacked)
        captured.step.copy_(step)
        captured.graph.replay()
        return captured.hidden

    def _capture(self, step: StepTensors, stacked: StackedLora | None) -> _CapturedGraph:
        step = replace(step.to(self._device), max_length=self._max_model_len)
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate workspaces on the first call, which cannot be captured
            self._forward(step, stacked)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may be copying an adapter to the device
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._forward(step, stacked)
        return _CapturedGraph(graph, step, stacked, hidden)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4 and multiples of 8, up to the first that is at least `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, max_num_seqs + 8, 8)]
    return sizes[: bisect_left(sizes, max_num_seqs) + 1]
