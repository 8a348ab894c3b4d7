"""A dataset as a run uses it: `prepare_data` turns `data:` of a configuration into rows and a report.

The rows are read, rendered and written to a store under CORRAL_HOME/cache/datasets once, by whichever process of a
machine comes first; every later one with the same data, tokenizer and length maps it. What is left out, held out or
taken twice is decided afterwards, from a few numbers per row. Knows neither models nor torch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.base_models.resolve import BaseCheckpoint
from training.chat.chat_format import ChatFormat
from training.config.data_config import DataConfig, RowKind
from training.data.build_store import refused, too_long_is_error
from training.data.formats import ACCEPTED, formats_of
from training.data.report import (
    LISTED,
    DataReport,
    ReadFacts,
    RowNote,
    Segment,
    SegmentUse,
    SourceReport,
    length_report,
    warnings_of,
)
from training.data.row_store import Conversation, Rows, RowStore, TokenizedRow
from training.data.split import hold_out, repeat_by_weight, repeats
from training.data.store_cache import open_or_build_store
from training.errors import DatasetError

_MAX_SAMPLES = 100
_SHOWN_ROWS = 3
_USES: dict[str, SegmentUse] = {
    "prompt_ids": "context",
    "chosen_ids": "trained",
    "completion_ids": "trained",
    "rejected_ids": "rejected",
}

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What `prepare_data` made.

    Attributes:
        train: the rows of one epoch, weights included, in the order of their sources.
        held_out: the rows for evaluation.
        report: what was found.
    """

    train: Rows[TokenizedRow]
    held_out: Rows[TokenizedRow]
    report: DataReport

    def held_out_samples(self) -> list[Conversation]:
        """Up to a hundred held-out conversations, spread evenly over all of them."""
        at = np.linspace(0, len(self.held_out) - 1, min(_MAX_SAMPLES, len(self.held_out))).astype(int).tolist()
        return [found for row in at if (found := self.held_out.conversation(row))]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which rows of a store are used for what, as row numbers."""

    train: list[Index]  # by source, weights included
    held_out: Index
    repeated: Index
    earliest: Index  # for every row of the store, the first that says the same
    num_leaked: int


def prepare_data(
    config: DataConfig,
    base: BaseCheckpoint,
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    seed: int,
    kind: RowKind = "sft",
) -> PreparedData:
    """Read, render, deduplicate and split a dataset; the same on every worker.

    Args:
        kind: rows of `preference` are `PreferenceRow`, of `unpaired_preference` `UnpairedRow`.

    Raises:
        DatasetError: a source cannot be read, a row is refused, or there are too few rows.
    """
    for source in config.sources:
        if source.format not in ("auto", *formats_of(kind)):
            raise DatasetError(
                f"dataset {source.path!r} has format {source.format!r}, which a method that trains on {kind} rows "
                f"cannot use: set data.format to auto or one of {', '.join(formats_of(kind))}"
            )
    store, facts = open_or_build_store(config, base, chat_format, kind, max_length)
    if config.on_bad_row == "error" and facts.skipped:  # the store was written by a more lenient run
        raise refused(facts.skipped[0], "on_bad_row", kind)
    if too_long_is_error(config) and facts.too_long:
        raise refused(facts.too_long[0], "on_too_long", kind)
    if not len(store):
        notes = [*facts.skipped[:1], *facts.too_long[:1]]
        first = "".join(f", the first because {note.source} {note.reason}" for note in notes[:1])
        raise DatasetError(
            f"dataset {', '.join(config.paths)} has no usable row ({sum(facts.rows_read)} read, "
            f"{facts.num_skipped + facts.num_too_long} skipped{first}): {ACCEPTED[kind]}"
        )
    choice = _choose(config, store, seed)
    train: Rows[TokenizedRow] = Rows(store, np.concatenate(choice.train))
    held_out: Rows[TokenizedRow] = Rows(store, choice.held_out)
    about = {"base": base.name, "chat_format": chat_format.name, "max_length": max_length}
    return PreparedData(train, held_out, _report(config, facts, choice, train, held_out, tokenizer, about))


def _choose(config: DataConfig, store: RowStore, seed: int) -> _Choice:
    """Leave out duplicates, hold out, and weigh; held-out rows are chosen among rows that are not weighed yet."""
    given = store.sources >= len(config.path)
    # Held-out files first: a training row that repeats one of theirs is no duplicate but a leak.
    sides = [np.flatnonzero(side) for side in (~given, given)]
    repeated = np.zeros(len(store), dtype=bool)
    earliest = np.arange(len(store))
    for side in sides:
        repeated[side], first = repeats(store.contents[side])
        earliest[side] = side[first]
    left_out = repeated if config.deduplicate else np.zeros(len(store), dtype=bool)
    usable, evaluated = (side[~left_out[side]] for side in sides)
    if config.held_out_path:
        leaked = np.isin(store.openings[usable], store.openings[evaluated])
        train, held_out, num_leaked = usable[~leaked], evaluated, int(leaked.sum())
        if not len(evaluated) or not len(train):
            what = "held-out row" if not len(evaluated) else "training row that is not held out too"
            raise DatasetError(
                f"dataset {', '.join(config.paths)} with data.held_out_path "
                f"{', '.join(source.path for source in config.held_out_path)} leaves no {what}: name other files"
            )
    else:
        chosen = hold_out(store.openings[usable], config.held_out, config.split_seed)
        train, held_out, num_leaked = usable[~chosen], usable[chosen], 0
    weighed = [
        repeat_by_weight(train[store.sources[train] == position], store.contents, source.weight, seed)
        for position, source in enumerate(config.path)
    ]
    if not sum(map(len, weighed)):
        raise DatasetError(f"no training row of {', '.join(config.paths)} is left with such weights: raise them")
    return _Choice(weighed, held_out, np.flatnonzero(repeated), earliest, num_leaked)


def _report(
    config: DataConfig,
    facts: ReadFacts,
    choice: _Choice,
    train: Rows[TokenizedRow],
    held_out: Rows[TokenizedRow],
    tokenizer: Tokenizer,
    about: dict[str, Any],
) -> DataReport:
    store = train.store
    repeated_in = store.sources[choice.repeated]
    held_out_in = store.sources[choice.held_out]
    sources = [
        SourceReport(
            path=source.path,
            weight=source.weight,
            num_rows_read=facts.rows_read[position],
            num_duplicates=int((repeated_in == position).sum()),
            num_train_rows=len(choice.train[position]) if position < len(config.path) else 0,
            num_held_out=int((held_out_in == position).sum()),
            num_train_tokens=_num_tokens(store, choice.train[position]) if position < len(config.path) else 0,
        )
        for position, source in enumerate(config.sources)
    ]
    used = np.ones(len(store), dtype=bool)
    used[choice.repeated] = not config.deduplicate
    report = DataReport(
        sources=sources,
        **about,
        **facts.model_dump(
            include={
                "formats", "turns", "roles", "unused_keys", "num_skipped", "skipped", "num_too_long", "too_long",
                "num_truncated", "truncated", "num_split", "sha256",
            }
        ),
        num_rows_read=sum(facts.rows_read),
        num_rows=len(store),
        deduplicated=config.deduplicate,
        num_duplicates=len(choice.repeated),
        duplicates=[
            RowNote(
                source=store.location(row),
                reason=f"says the same as {store.location(int(choice.earliest[row]))}",
                excerpt=_excerpt(store.conversation(row)),
            )
            for row in choice.repeated[:LISTED].tolist()
        ],
        num_leaked=choice.num_leaked,
        num_train_rows=len(train),
        num_held_out=len(held_out),
        num_train_tokens=train.num_tokens,
        num_trained_tokens=train.num_trained_tokens,
        lengths=length_report(store.lengths[used], facts.lengths_too_long, about["max_length"]),
        warnings=[],
        samples=[_segments(store, row, tokenizer) for row in _spread(train.numbers, _SHOWN_ROWS)],
    )  # fmt: skip
    return report.model_copy(update={"warnings": warnings_of(report, facts)})


def _num_tokens(store: RowStore, index: Index) -> int:
    return int(store.lengths[index].sum(dtype=np.int64))


def _spread(index: Index, num: int) -> list[int]:
    """Up to `num` different row numbers from all over the index."""
    at = np.linspace(0, len(index) - 1, min(num, len(index))).astype(int)
    return [*dict.fromkeys(index[at].tolist())]


def _excerpt(conversation: Conversation | None) -> str:
    return conversation.messages[-1].content[:80] if conversation else ""


def _segments(store: RowStore, row: int, tokenizer: Tokenizer) -> list[Segment]:
    """The row as the model sees it, decoded from its tokens."""

    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    input_ids = store.tokens(row, "input_ids")
    if input_ids is None:
        found = [(use, store.tokens(row, name)) for name, use in _USES.items()]
        return [Segment(text=text(ids), use=use) for use, ids in found if ids]
    bounds = [0, *(store.tokens(row, "spans") or []), len(input_ids)]
    return [
        Segment(text=text(input_ids[begin:end]), use="trained" if number % 2 else "context")
        for number, (begin, end) in enumerate(itertools.pairwise(bounds))
        if end > begin
    ]
