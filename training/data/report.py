"""What is known of a dataset before anything is trained on it: `DataReport`.

`training.data.prepare` makes one for every run, which keeps it as `data.json`; `corral data check` shows it. The
counting that needs the rows' text happens while they are read and is handed over as `ReadFacts`.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

SegmentUse = Literal["context", "trained", "rejected"]

LISTED = 1000  # rows named in a report; all are counted
_HISTOGRAM_BARS = 12
_SHOWN_KEYS = 8
_LENGTHS_ASKED = (128, 256, 512, 1024, 2048, 4096, 8192)


class RowNote(BaseModel):
    """A row worth naming: left out, shortened, or twice in the data."""

    source: str  # location, such as `file.jsonl:12`
    reason: str
    excerpt: str


class ReadFacts(BaseModel):
    """What was counted while the sources were read; the same for every split and weight of them.

    Attributes:
        rows_read: by position of the source.
        turns: rows by number of their assistant turns.
        roles: messages by role.
        unused_keys: rows by a key that says nothing to their format, such as `tools` or `messages[].name`.
        lengths_too_long: rows that were left out for their length, by tokens.
        short_answers: answers of a single token before their end of turn.
        markup: rows that hold control tokens of a chat format as text.
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
        """Name a row, as long as not too many are named already."""
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
    """Tokens per row, of the rows in use and of those that were too long.

    Attributes:
        histogram: [largest length, rows] of each bar.
        longer_than: rows that a `max_length` of so many tokens leaves out.
    """

    mean: float
    p50: int
    p95: int
    max: int
    histogram: list[tuple[int, int]]
    longer_than: dict[int, int]


class Segment(BaseModel):
    """A stretch of a row as text; `rejected` is the worse of two answers."""

    text: str
    use: SegmentUse


class DataReport(BaseModel):
    """A dataset as a run uses it; JSON on disk.

    Attributes:
        unused_keys: rows by a key that was seen in them and not used, the first thousand such keys.
        num_rows: rows that can be used, duplicates and held-out ones included.
        num_duplicates: rows that say the same as an earlier one; left out where `deduplicated`.
        num_leaked: training rows left out because `held_out_path` asks the same.
        num_train_rows: per epoch, weights included.
        num_train_tokens: likewise; `num_trained_tokens` of them carry loss.
        skipped, too_long, truncated, duplicates: the first thousand.
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
        """Of an epoch's tokens, those that carry loss."""
        return self.num_trained_tokens / max(1, self.num_train_tokens)

    @property
    def unused(self) -> str:
        """The commonest keys that were not used, with the rows that have them; empty where there is none."""
        listed = [*self.unused_keys.items()][:_SHOWN_KEYS]
        more = len(self.unused_keys) - len(listed)
        return ", ".join(f"{key} ({count:,} rows)" for key, count in listed) + (f" and {more:,} more" if more else "")

    def summary(self) -> str:
        """A few lines for the person who starts a run."""
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (self.num_skipped, "bad"),
                (self.num_too_long, f"longer than {self.max_length}"),
                (self.num_duplicates if self.deduplicated else 0, "duplicates"),
                (self.num_leaked, "that are held out"),
            )
            if count
        ]
        line = (
            f"data: {self.num_train_rows:,} training and {self.num_held_out:,} held-out rows "
            f"({', '.join(self.formats)}), {self.num_train_tokens:,} tokens an epoch, "
            f"{self.trained_share:.0%} of them trained"
        )
        line += f"; left out: {', '.join(left_out)}" if left_out else ""
        line += f"; {self.num_truncated:,} shortened" if self.num_truncated else ""
        unused = [f"data: keys that are not used: {self.unused}"] if self.unused_keys else []
        return "\n".join([line, *unused, *(f"data: note: {warning}" for warning in self.warnings)])


def length_report(lengths: NDArray[np.uint32], too_long: dict[int, int], max_length: int) -> LengthReport:
    """Of rows in use and of rows left out for their length; at least one of either."""
    extra = np.repeat(np.array([*too_long], dtype=np.uint32), np.array([*too_long.values()], dtype=np.int64))
    seen = np.sort(np.concatenate([lengths, extra]))
    longest = int(seen[-1])
    width = _nice_width(longest / _HISTOGRAM_BARS)
    bounds = np.arange(width, longest + width, width)
    counts = np.diff(np.searchsorted(seen, bounds, side="right"), prepend=0)
    asked = sorted({n for n in _LENGTHS_ASKED if n < longest} | {max_length})
    return LengthReport(
        mean=float(seen.mean()),
        p50=_percentile(seen, 0.5),
        p95=_percentile(seen, 0.95),
        max=longest,
        histogram=[(int(bound), int(count)) for bound, count in zip(bounds, counts, strict=True)],
        longer_than={n: len(seen) - int(np.searchsorted(seen, n, side="right")) for n in asked},
    )


def warnings_of(report: DataReport, facts: ReadFacts) -> list[str]:
    """What a careful person would ask about this dataset, each in one sentence."""
    found = []
    if facts.empty_system:
        found.append(f"{facts.empty_system:,} rows have an empty system prompt: leave it out where it says nothing")
    if facts.markup:
        found.append(
            f"{facts.markup:,} rows hold control tokens of a chat format as text, such as <|im_end|> or [INST]: they "
            "are trained as plain text; take a template's markup out of the rows"
        )
    if (answers := facts.roles.get("assistant", 0)) and facts.short_answers > answers / 10:
        found.append(f"{facts.short_answers:,} of {answers:,} answers are a single token")
    if len(report.sources) > 1:
        largest = max(report.sources, key=lambda source: source.num_train_rows)
        share = largest.num_train_rows / max(1, report.num_train_rows)
        if share > 0.9:
            found.append(f"{share:.0%} of the training rows are from {largest.path}: its weight drowns the others")
    if report.num_duplicates > report.num_rows / 5:
        kept = "are left out" if report.deduplicated else "are kept (data.deduplicate is false)"
        found.append(f"{report.num_duplicates:,} of {report.num_rows:,} rows say the same as an earlier one and {kept}")
    if report.num_rows_read and (lost := report.num_skipped + report.num_too_long) > report.num_rows_read / 20:
        found.append(f"{lost:,} of {report.num_rows_read:,} rows cannot be used")
    if report.num_held_out == 0:
        found.append("no row is held out, so nothing tells whether the adapter is better than its base")
    if report.num_train_rows < 50:
        found.append(f"only {report.num_train_rows:,} training rows: an adapter will learn them by heart")
    if report.trained_share < 0.05:
        found.append(f"only {report.trained_share:.1%} of the tokens are trained, the rest are prompts")
    return found


def _percentile(ordered: NDArray[np.uint32], share: float) -> int:
    """The smallest length that so many of the rows do not exceed."""
    return int(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _nice_width(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 10 ** math.floor(math.log10(max(width, 1.0)))
    return int(next(step * scale for step in (1, 2, 5, 10) if step * scale >= width))
