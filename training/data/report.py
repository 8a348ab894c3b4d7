"""`DataReport`: what is known of a dataset before a run trains on it, as kept in the run's `data.json`.

Counts that need the text of the rows are taken while the sources are read, as `ReadFacts`.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

SegmentRole = Literal["context", "trained", "rejected"]

LISTED = 1000  # rows listed per kind of note; all are counted
_HISTOGRAM_BARS = 12
_SHOWN_KEYS = 8
_MAX_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)  # that a report counts the longer rows for


class RowNote(BaseModel):
    """A row that was skipped, truncated, or is a duplicate."""

    source: str  # location, such as `file.jsonl:12`
    reason: str
    excerpt: str


class ReadFacts(BaseModel):
    """The counts taken while the sources are read; they do not depend on the split or the weights.

    Attributes:
        rows_read: by position of the source.
        turns: number of rows by number of assistant turns.
        roles: number of messages by role.
        unused_keys: number of rows by key that their format ignores, such as `tools` or `messages[].name`.
        lengths_too_long: number of rows that were skipped as too long, by number of tokens.
        short_answers: answers of a single token before the end of turn.
        markup: rows that contain control tokens of a chat format as text.
        sha256: of the files' bytes, or of a hub dataset's rows as JSON.
    """

    rows_read: list[int]
    formats: dict[str, int] = {}
    turns: dict[int, int] = {}
    roles: dict[str, int] = {}
    unused_keys: dict[str, int] = {}
    num_skipped: int = 0
    num_too_long: int = 0
    skipped: list[RowNote] = []
    too_long: list[RowNote] = []
    lengths_too_long: dict[int, int] = {}
    num_truncated: int = 0
    truncated: list[RowNote] = []
    num_split: int = 0
    empty_system: int = 0
    short_answers: int = 0
    markup: int = 0
    sha256: str = ""

    def note(self, notes: list[RowNote], note: RowNote) -> None:
        """Append a note, unless `LISTED` are listed already."""
        if len(notes) < LISTED:
            notes.append(note)


class SourceReport(BaseModel):
    """One source; `num_train_rows` is per epoch, weight included."""

    path: str
    weight: float
    num_rows_read: int
    num_duplicates: int
    num_train_rows: int
    num_held_out: int
    num_train_tokens: int


class LengthReport(BaseModel):
    """Tokens per row, over the rows in use and those that were too long.

    Attributes:
        histogram: [largest length, number of rows] of each bar.
        longer_than: number of rows that a given `max_length` in tokens would exclude.
    """

    mean: float
    p50: int
    p95: int
    max: int
    histogram: list[tuple[int, int]]
    longer_than: dict[int, int]


class Segment(BaseModel):
    """A span of a row as text; `rejected` is the worse of two answers."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    text: str
    role: SegmentRole = Field(alias="use")  # its key in data.json


class DataReport(BaseModel):
    """A dataset as a run uses it; JSON on disk.

    Attributes:
        unused_keys: number of rows by key that their format ignores; the first thousand such keys.
        num_rows: usable rows, duplicates and held-out rows included.
        num_duplicates: rows with the content of an earlier one; dropped where `deduplicated`.
        num_leaked: training rows dropped because `held_out_path` has the same first user message.
        num_train_rows: per epoch, weights included.
        num_train_tokens: per epoch, weights included; `num_trained_tokens` of them carry loss.
        skipped, too_long, truncated, duplicates: the first thousand of each.
    """

    sources: list[SourceReport]
    base: str
    chat_format: str
    max_length: int
    formats: dict[str, int]
    turns: dict[int, int]
    roles: dict[str, int]
    unused_keys: dict[str, int]
    num_rows_read: int
    num_rows: int
    num_skipped: int
    skipped: list[RowNote]
    num_too_long: int
    too_long: list[RowNote]
    num_truncated: int
    truncated: list[RowNote]
    num_split: int
    deduplicated: bool
    num_duplicates: int
    duplicates: list[RowNote]
    num_leaked: int
    num_train_rows: int
    num_held_out: int
    num_train_tokens: int
    num_trained_tokens: int
    lengths: LengthReport
    warnings: list[str]
    samples: list[list[Segment]]
    sha256: str

    @property
    def trained_share(self) -> float:
        """The fraction of an epoch's tokens that carry loss."""
        return self.num_trained_tokens / max(1, self.num_train_tokens)

    @property
    def unused(self) -> str:
        """The most common unused keys and how many rows have them; empty if there are none."""
        shown = [*self.unused_keys.items()][:_SHOWN_KEYS]
        more = len(self.unused_keys) - len(shown)
        return ", ".join(f"{key} ({count:,} rows)" for key, count in shown) + (f" and {more:,} more" if more else "")

    def summary(self) -> str:
        """A few lines for the person who starts a run."""
        dropped = [
            f"{count:,} {reason}"
            for count, reason in (
                (self.num_skipped, "bad"),
                (self.num_too_long, f"longer than {self.max_length} tokens"),
                (self.num_duplicates if self.deduplicated else 0, "duplicates"),
                (self.num_leaked, "also held out"),
            )
            if count
        ]
        line = (
            f"data: {self.num_train_rows:,} training and {self.num_held_out:,} held-out rows "
            f"({', '.join(self.formats)}), {self.num_train_tokens:,} tokens per epoch, "
            f"{self.trained_share:.0%} of them trained"
        )
        line += f"; dropped: {', '.join(dropped)}" if dropped else ""
        line += f"; {self.num_truncated:,} truncated" if self.num_truncated else ""
        unused = [f"data: unused keys: {self.unused}"] if self.unused_keys else []
        return "\n".join([line, *unused, *(f"data: note: {warning}" for warning in self.warnings)])


def length_report(lengths: NDArray[np.uint32], too_long: dict[int, int], max_length: int) -> LengthReport:
    """The lengths of the rows in use and, by number of tokens, of those that were too long; at least one of either."""
    excluded = np.repeat(np.array([*too_long], dtype=np.uint32), np.array([*too_long.values()], dtype=np.int64))
    all_lengths = np.sort(np.concatenate([lengths, excluded]))
    longest = int(all_lengths[-1])
    width = _nice_width(longest / _HISTOGRAM_BARS)
    bounds = np.arange(width, longest + width, width)
    counts = np.diff(np.searchsorted(all_lengths, bounds, side="right"), prepend=0)
    max_lengths = sorted({n for n in _MAX_LENGTHS if n < longest} | {max_length})
    return LengthReport(
        mean=float(all_lengths.mean()),
        p50=_percentile(all_lengths, 0.5),
        p95=_percentile(all_lengths, 0.95),
        max=longest,
        histogram=[(int(bound), int(count)) for bound, count in zip(bounds, counts, strict=True)],
        longer_than={n: len(all_lengths) - int(np.searchsorted(all_lengths, n, side="right")) for n in max_lengths},
    )


def warnings_of(report: DataReport, facts: ReadFacts) -> list[str]:
    """Likely mistakes in this dataset, one sentence each."""
    warnings = []
    if facts.empty_system:
        warnings.append(f"{facts.empty_system:,} rows have an empty system prompt: remove it from them")
    if facts.markup:
        warnings.append(
            f"{facts.markup:,} rows contain control tokens of a chat format as text, such as <|im_end|> or [INST], "
            "which are trained as plain text: remove the template's markup from the rows"
        )
    if (answers := facts.roles.get("assistant", 0)) and facts.short_answers > answers / 10:
        warnings.append(f"{facts.short_answers:,} of {answers:,} answers are a single token")
    if len(report.sources) > 1:
        largest = max(report.sources, key=lambda source: source.num_train_rows)
        share = largest.num_train_rows / max(1, report.num_train_rows)
        if share > 0.9:
            warnings.append(f"{share:.0%} of the training rows are from {largest.path}, which dominates the mix")
    if report.num_duplicates > report.num_rows / 5:
        action = "are dropped" if report.deduplicated else "are kept (data.deduplicate is false)"
        warnings.append(f"{report.num_duplicates:,} of {report.num_rows:,} rows are duplicates and {action}")
    if report.num_rows_read and (unusable := report.num_skipped + report.num_too_long) > report.num_rows_read / 20:
        warnings.append(f"{unusable:,} of {report.num_rows_read:,} rows cannot be used")
    if report.num_held_out == 0:
        warnings.append("no row is held out, so the adapter cannot be compared with its base")
    if report.num_train_rows < 50:
        warnings.append(f"only {report.num_train_rows:,} training rows: the adapter is likely to memorize them")
    if report.trained_share < 0.05:
        warnings.append(f"only {report.trained_share:.1%} of the tokens are trained, the rest are prompts")
    return warnings


def _percentile(sorted_lengths: NDArray[np.uint32], share: float) -> int:
    """The smallest length that at least `share` of the rows do not exceed."""
    return int(sorted_lengths[max(0, math.ceil(share * len(sorted_lengths)) - 1)])


def _nice_width(width: float) -> int:
    """Round up to one of 1, 2, 5, 10, 20, 50, ..."""
    scale = 10 ** math.floor(math.log10(max(width, 1.0)))
    return int(next(step * scale for step in (1, 2, 5, 10) if step * scale >= width))
