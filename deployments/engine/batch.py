"""From scheduled chunks to what a forward takes, and from constraints to what sampling may choose."""

import logging
from itertools import islice

from deployments.engine.constraint import PackedMask
from deployments.engine.llama.interface import ForwardBatch
from deployments.engine.request import Delta
from deployments.engine.scheduler import Chunk
from deployments.engine.sequence import Sequence

logger = logging.getLogger(__name__)


def constraint_masks(sequences: list[Sequence]) -> tuple[dict[int, PackedMask], dict[int, Delta]]:
    """What the constraints allow next, and the answers that end here: complete, or with a constraint that failed."""
    masks: dict[int, PackedMask] = {}
    ended: dict[int, Delta] = {}
    for i, sequence in enumerate(sequences):
        if sequence.constraint is None:
            continue
        stop_token_ids = () if sequence.sampling.ignore_eos else sequence.sampling.stop_token_ids
        try:
            mask = sequence.constraint.allowed(stop_token_ids)
        except Exception:  # as in `Engine._advance`
            logger.exception("request %s: its constraint failed", sequence.request_id)
            ended[i] = Delta([], "error", sequence.index)
            continue
        if mask is None:
            ended[i] = Delta([], "stop", sequence.index)
        else:
            masks[i] = mask
    return masks, ended


def forward_batch(chunks: list[Chunk], block_size: int) -> tuple[ForwardBatch, list[tuple[Sequence, list[int]]]]:
    """The chunks as one batch, and what scores prompt tokens: sequences with the positions of the predicted tokens.

    `output_rows` are first the scoring ones, then the last row of every sequence that is completely computed after it.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    last_rows: list[int] = []
    scoring_rows: list[int] = []
    scored: list[tuple[Sequence, list[int]]] = []
    width = max(-(-chunk.end // block_size) for chunk in chunks)
    tables = []
    for row, chunk in enumerate(chunks):
        sequence, first = chunk.sequence, len(token_ids)
        token_ids += islice(sequence.token_ids, chunk.start, chunk.end)
        positions += range(chunk.start, chunk.end)
        slots += [sequence.adapter_slot] * chunk.num_tokens
        rows += [row] * chunk.num_tokens
        table = sequence.block_table[:width]
        tables.append(table + [0] * (width - len(table)))
        if sequence.sampling.prompt_logprobs is not None:
            predicted = list(range(chunk.start + 1, min(chunk.end + 1, sequence.num_prompt_tokens)))
            scored.append((sequence, predicted))
            scoring_rows += range(first, first + len(predicted))
        if chunk.end == len(sequence.token_ids):
            last_rows.append(len(token_ids) - 1)
    return ForwardBatch(token_ids, positions, slots, rows, tables, scoring_rows + last_rows), scored
