"""A `ForwardBatch` as the tensors that `torch_llama.py` computes with, and its padded form for CUDA graphs."""

from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.llama.lora import NO_ADAPTER


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Built once a step and used by every layer; `of` builds it on the CPU.

    Attributes:
        token_ids, positions, adapter_slots: as in `ForwardBatch`, [num_tokens].
        kv_rows: row of the flattened KV cache that each token's key and value go to, [num_tokens].
        tables: KV blocks of each sequence, [num_sequences, width].
        lengths: tokens in the cache after this step, [num_sequences].
        starts: first token of each sequence, and the number of tokens, [num_sequences + 1].
        kv_starts: the running sum of `lengths` from 0, [num_sequences + 1].
        max_new: largest number of new tokens of a sequence.
        max_length: at least the largest of `lengths`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    adapter_slots: torch.Tensor
    kv_rows: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    kv_starts: torch.Tensor
    max_new: int
    max_length: int

    @classmethod
    def of(cls, batch: ForwardBatch, block_size: int) -> "StepTensors":
        """The batch, for a cache with blocks of `block_size` tokens."""
        starts = [i for i, s in enumerate(batch.seq_index) if i == 0 or s != batch.seq_index[i - 1]]
        ends = [*starts[1:], len(batch.seq_index)]
        lengths = [batch.positions[end - 1] + 1 for end in ends]
        kv_rows = [
            batch.block_tables[s][p // block_size] * block_size + p % block_size
            for s, p in zip(batch.seq_index, batch.positions, strict=True)
        ]
        return cls(
            token_ids=torch.tensor(batch.token_ids),
            positions=torch.tensor(batch.positions),
            adapter_slots=torch.tensor(batch.adapter_slots),
            kv_rows=torch.tensor(kv_rows),
            tables=torch.tensor(batch.block_tables, dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            starts=torch.tensor([*starts, len(batch.seq_index)], dtype=torch.int32),
            kv_starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            max_new=max(end - start for start, end in zip(starts, ends, strict=True)),
            max_length=max(lengths),
        )

    def to(self, device: torch.device) -> "StepTensors":
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def copy_(self, other: "StepTensors") -> None:
        """Take over the tensors' values from a step of the same shapes."""
        for name in _TENSORS:
            getattr(self, name).copy_(getattr(other, name))


_TENSORS = [field.name for field in fields(StepTensors) if field.type is torch.Tensor]


def padded(batch: ForwardBatch, num_sequences: int, table_width: int, spare_block: int) -> ForwardBatch:
    """A batch with one token for each sequence, with sequences added that lie in the spare block and that nobody reads.

    Args:
        table_width: what the block tables are widened to.
        spare_block: a block that no sequence holds.
    """
    num_added = num_sequences - len(batch.token_ids)
    return ForwardBatch(
        token_ids=batch.token_ids + [0] * num_added,
        positions=batch.positions + [0] * num_added,
        adapter_slots=batch.adapter_slots + [NO_ADAPTER] * num_added,
        seq_index=list(range(num_sequences)),
        block_tables=[table + [spare_block] * (table_width - len(table)) for table in batch.block_tables]
        + [[spare_block] * table_width] * num_added,
        output_rows=batch.output_rows,
    )
