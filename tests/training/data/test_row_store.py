"""The row store returns the rows that were written, at random access, in any process."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.chat.messages import Message
from training.data.row_store import IGNORED_LABEL, Rows, RowStore, StoredRow, StoreWriter, TokenizedRow, trained_spans

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=8)
hashes = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(["sft", "preference", "unpaired"])
masks = st.lists(st.booleans(), max_size=12)


@st.composite
def stored_rows(draw: st.DrawFn, kind: str) -> StoredRow:
    names = {
        "sft": ("input_ids",),
        "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
        "unpaired": ("prompt_ids", "completion_ids"),
    }
    lists = {name: draw(tokens) for name in names[kind]}
    if kind == "sft":
        mask = draw(st.lists(st.booleans(), min_size=len(lists["input_ids"]), max_size=len(lists["input_ids"])))
        lists["spans"] = trained_spans(mask)
    return StoredRow(
        lists,
        label=draw(st.booleans()) if kind == "unpaired" else None,
        location=draw(st.text(max_size=9)),
        messages=draw(st.none() | st.tuples(st.builds(Message, st.just("user"), st.text(max_size=9), st.booleans()))),
        source=draw(st.integers(0, 9)),
        opening=draw(hashes),
        content=draw(hashes),
        length=draw(st.integers(0, 2**32 - 1)),
        num_trained=draw(st.integers(0, 2**32 - 1)),
    )


def write(directory: Path, rows: list[StoredRow]) -> RowStore:
    directory.mkdir(exist_ok=True)
    with StoreWriter(directory) as store:
        for row in rows:
            store.append(row)
    return RowStore(directory)


def expected(row: StoredRow) -> dict[str, Any]:
    if "input_ids" not in row.tokens:
        return row.tokens | ({} if row.label is None else {"label": row.label})
    labels = [IGNORED_LABEL] * len(row.tokens["input_ids"])
    spans = row.tokens["spans"]
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        labels[begin:end] = row.tokens["input_ids"][begin:end]
    return {"input_ids": row.tokens["input_ids"], "labels": labels}


@settings(max_examples=40, deadline=None)
@given(kinds.flatmap(lambda kind: st.lists(stored_rows(kind), max_size=20)), st.integers(0, 2))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[StoredRow], filler: int) -> None:
    """Across batches too: the filler moves the rows to the second and third batch of the file."""
    other = {name: [] for name in rows[0].tokens} if rows else {"input_ids": [], "spans": []}
    plain = StoredRow(other, None, "", None, 0, 0, 0, 1, 0)
    directory = tmp_path_factory.mktemp("store")
    store = write(directory, [plain] * (filler * 250) + rows)
    for at, row in enumerate(rows, start=filler * 250):
        assert store.row(at) == expected(row)
        assert store.location(at) == row.location
        conversation = store.conversation(at)
        assert (conversation.messages if conversation else None) == row.messages
        stored = (store.sources[at], store.openings[at], store.contents[at], store.lengths[at], store.num_trained[at])
        assert stored == (row.source, row.opening, row.content, row.length, row.num_trained)
    assert len(store) == filler * 250 + len(rows)


def numbered(directory: Path, num: int) -> RowStore:
    return write(
        directory,
        [
            StoredRow({"input_ids": [n] * (n % 7), "spans": [0, n % 7]}, None, str(n), None, 0, n, n, n % 7, n % 7)
            for n in range(num)
        ],
    )


def test_rows_are_a_sequence_in_any_order_and_repeat(tmp_path: Path) -> None:
    store = numbered(tmp_path / "s", 1000)
    rows: Rows[TokenizedRow] = Rows(store, np.array([999, 3, 3, 500]))
    assert [row["input_ids"] for row in rows] == [[999] * 5, [3] * 3, [3] * 3, [500] * 3]
    assert (len(rows), rows.lengths.tolist(), rows.num_tokens, rows.num_trained_tokens) == (4, [5, 3, 3, 3], 14, 14)
    assert rows[-1] == rows[3] == {"input_ids": [500] * 3, "labels": [500] * 3}
    part = rows[1::2]
    assert isinstance(part, Rows)
    assert [row["input_ids"] for row in part] == [[3] * 3, [500] * 3]
    with pytest.raises(IndexError):
        rows[4]


def test_rows_pickle_as_a_path(tmp_path: Path) -> None:
    """Data loader workers and Ray get the path, not the rows."""
    rows: Rows[TokenizedRow] = Rows(numbered(tmp_path / "s", 1000), np.arange(10))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert [*pickle.loads(pickled)] == [*rows]


def test_other_programs_read_the_store(tmp_path: Path) -> None:
    numbered(tmp_path / "s", 300)
    table = pa.ipc.open_file(str(tmp_path / "s" / "rows.arrow")).read_all()
    assert table.num_rows == 300
    assert table["input_ids"][299].as_py() == [299] * 5


@given(masks)
def test_spans_are_the_stretches_of_the_mask(mask: list[bool]) -> None:
    spans = trained_spans(mask)
    assert spans == sorted(set(spans))
    assert [any(b <= at < e for b, e in zip(spans[::2], spans[1::2], strict=True)) for at in range(len(mask))] == mask
