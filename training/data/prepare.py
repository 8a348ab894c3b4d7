"""`prepare_data`: from the `data:` section of a configuration to training rows, held-out rows and a report.

The rows are read, tokenized and written to a store under CORRAL_HOME/cache/datasets once per machine, by the first
process that needs them; later processes with the same data, tokenizer and length map that store. Which rows are
dropped, held out or repeated is decided afterwards, from a few numbers per row. Knows neither models nor torch.
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
from training.data.build_store import row_error, too_long_is_error
from training.data.formats import ACCEPTED, formats_of
from training.data.report import (
    LISTED,
    DataReport,
    ReadFacts,
    RowNote,
    Segment,
    SegmentRole,
    SourceReport,
    length_report,
    warnings_of,
)
from training.data.row_store import Conversation, Rows, RowStore, TokenizedRow
from training.data.split import find_duplicates, hold_out, repeat_by_weight
from training.data.store_cache import open_or_build_store
from training.errors import DatasetError

_MAX_SAMPLES = 100
_SHOWN_ROWS = 3
_ROLES: dict[str, SegmentRole] = {
    "prompt_ids": "context",
    "chosen_ids": "trained",
    "completion_ids": "trained",
    "rejected_ids": "rejected",
}

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The result of `prepare_data`.

    Attributes:
        train: the rows of one epoch, repeated by weight, in the order of their sources.
        held_out: the rows for evaluation.
        report: what was read, dropped and counted.
    """

    train: Rows[TokenizedRow]
    held_out: Rows[TokenizedRow]
    report: DataReport

    def held_out_samples(self) -> list[Conversation]:
        """Up to a hundred held-out conversations, evenly spaced over all of them."""
        rows = np.linspace(0, len(self.held_out) - 1, min(_MAX_SAMPLES, len(self.held_out))).astype(int).tolist()
        return [conversation for row in rows if (conversation := self.held_out.conversation(row))]


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which rows of a store are used for what, as row numbers."""

    train: list[Index]  # by source, repeated by weight
    held_out: Index
    duplicates: Index
    first_copy: Index  # for every row of the store, the first row with the same content
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
    """Read, tokenize, deduplicate and split a dataset; every worker gets the same result.

    Args:
        kind: `sft` gives `TokenizedRow`s, `preference` `PreferenceRow`s and `unpaired_preference` `UnpairedRow`s.

    Raises:
        DatasetError: a source cannot be read, a row is not accepted, or there are too few rows.
    """
    for source in config.sources:
        if source.format not in ("auto", *formats_of(kind)):
            raise DatasetError(
                f"dataset {source.path!r} has format {source.format!r}, but the method trains on {kind} rows: "
                f"set data.format to auto or one of {', '.join(formats_of(kind))}"
            )
    store, facts = open_or_build_store(config, base, chat_format, kind, max_length)
    if config.on_bad_row == "error" and facts.skipped:  # the store is from a run that skipped bad rows
        raise row_error(facts.skipped[0], "on_bad_row", kind)
    if too_long_is_error(config) and facts.too_long:
        raise row_error(facts.too_long[0], "on_too_long", kind)
    if not len(store):
        notes = [*facts.skipped[:1], *facts.too_long[:1]]
        first = "".join(f"; first: {note.source}: {note.reason}" for note in notes[:1])
        raise DatasetError(
            f"dataset {', '.join(config.paths)} has no usable row ({sum(facts.rows_read)} read, "
            f"{facts.num_skipped + facts.num_too_long} skipped{first}): {ACCEPTED[kind]}"
        )
    selection = _select(config, store, seed)
    train: Rows[TokenizedRow] = Rows(store, np.concatenate(selection.train))
    held_out: Rows[TokenizedRow] = Rows(store, selection.held_out)
    settings = {"base": base.name, "chat_format": chat_format.name, "max_length": max_length}
    return PreparedData(train, held_out, _report(config, facts, selection, train, held_out, tokenizer, settings))


def _select(config: DataConfig, store: RowStore, seed: int) -> _Selection:
    """Drop duplicates, hold rows out, then repeat the training rows by weight."""
    in_held_out_path = store.sources >= len(config.path)
    # `path` and `held_out_path` apart: a training row that is also a held-out row is a leak, not a duplicate.
    sides = [np.flatnonzero(side) for side in (~in_held_out_path, in_held_out_path)]
    is_duplicate = np.zeros(len(store), dtype=bool)
    first_copy = np.arange(len(store))
    for side in sides:
        is_duplicate[side], first = find_duplicates(store.contents[side])
        first_copy[side] = side[first]
    dropped = is_duplicate if config.deduplicate else np.zeros(len(store), dtype=bool)
    usable, evaluated = (side[~dropped[side]] for side in sides)
    if config.held_out_path:
        leaked = np.isin(store.openings[usable], store.openings[evaluated])
        train, held_out, num_leaked = usable[~leaked], evaluated, int(leaked.sum())
        if not len(evaluated) or not len(train):
            missing = "held-out row" if not len(evaluated) else "training row that is not also held out"
            raise DatasetError(
                f"dataset {', '.join(config.paths)} with data.held_out_path "
                f"{', '.join(source.path for source in config.held_out_path)} leaves no {missing}: use other files"
            )
    else:
        mask = hold_out(store.openings[usable], config.held_out, config.split_seed)
        train, held_out, num_leaked = usable[~mask], usable[mask], 0
    weighted = [
        repeat_by_weight(train[store.sources[train] == position], store.contents, source.weight, seed)
        for position, source in enumerate(config.path)
    ]
    if not sum(map(len, weighted)):
        raise DatasetError(f"the weights leave no training row of {', '.join(config.paths)}: raise them")
    return _Selection(weighted, held_out, np.flatnonzero(is_duplicate), first_copy, num_leaked)


def _report(
    config: DataConfig,
    facts: ReadFacts,
    selection: _Selection,
    train: Rows[TokenizedRow],
    held_out: Rows[TokenizedRow],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
) -> DataReport:
    store = train.store
    duplicate_sources = store.sources[selection.duplicates]
    held_out_sources = store.sources[selection.held_out]
    sources = [
        SourceReport(
            path=source.path,
            weight=source.weight,
            num_rows_read=facts.rows_read[position],
            num_duplicates=int((duplicate_sources == position).sum()),
            num_train_rows=len(selection.train[position]) if position < len(config.path) else 0,
            num_held_out=int((held_out_sources == position).sum()),
            num_train_tokens=_num_tokens(store, selection.train[position]) if position < len(config.path) else 0,
        )
        for position, source in enumerate(config.sources)
    ]
    in_use = np.ones(len(store), dtype=bool)
    in_use[selection.duplicates] = not config.deduplicate
    report = DataReport(
        sources=sources,
        **settings,
        **facts.model_dump(
            include={
                "formats", "turns", "roles", "unused_keys", "num_skipped", "skipped", "num_too_long", "too_long",
                "num_truncated", "truncated", "num_split", "sha256",
            }
        ),
        num_rows_read=sum(facts.rows_read),
        num_rows=len(store),
        deduplicated=config.deduplicate,
        num_duplicates=len(selection.duplicates),
        duplicates=[
            RowNote(
                source=store.location(row),
                reason=f"duplicates {store.location(int(selection.first_copy[row]))}",
                excerpt=_excerpt(store.conversation(row)),
            )
            for row in selection.duplicates[:LISTED].tolist()
        ],
        num_leaked=selection.num_leaked,
        num_train_rows=len(train),
        num_held_out=len(held_out),
        num_train_tokens=train.num_tokens,
        num_trained_tokens=train.num_trained_tokens,
        lengths=length_report(store.lengths[in_use], facts.lengths_too_long, settings["max_length"]),
        warnings=[],
        samples=[_segments(store, row, tokenizer) for row in _evenly_spaced(train.numbers, _SHOWN_ROWS)],
    )  # fmt: skip
    return report.model_copy(update={"warnings": warnings_of(report, facts)})


def _num_tokens(store: RowStore, index: Index) -> int:
    return int(store.lengths[index].sum(dtype=np.int64))


def _evenly_spaced(index: Index, num: int) -> list[int]:
    """Up to `num` different row numbers, evenly spaced over the index."""
    positions = np.linspace(0, len(index) - 1, min(num, len(index))).astype(int)
    return [*dict.fromkeys(index[positions].tolist())]


def _excerpt(conversation: Conversation | None) -> str:
    return conversation.messages[-1].content[:80] if conversation else ""


def _segments(store: RowStore, row: int, tokenizer: Tokenizer) -> list[Segment]:
    """The row as the model sees it, decoded from its tokens."""

    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    input_ids = store.tokens(row, "input_ids")
    if input_ids is None:
        token_lists = [(role, store.tokens(row, name)) for name, role in _ROLES.items()]
        return [Segment(text=text(ids), role=role) for role, ids in token_lists if ids]
    bounds = [0, *(store.tokens(row, "spans") or []), len(input_ids)]
    return [
        Segment(text=text(input_ids[begin:end]), role="trained" if number % 2 else "context")
        for number, (begin, end) in enumerate(itertools.pairwise(bounds))
        if end > begin
    ]
