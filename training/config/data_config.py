"""The `data:` section of a training configuration: which rows, in which format, how many held out.

Schema only: reads no files, imports nothing heavier than pydantic.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator

DatasetFormat = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "guanaco",
    "text",
    "preference",
    "unpaired_preference",
]
RowKind = Literal["sft", "preference", "unpaired_preference"]  # what a training method consumes
Column = Literal[
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "prompt",
    "completion",
    "text",
    "chosen",
    "rejected",
    "label",
]
OnBadRow = Literal["error", "skip"]
OnTooLong = Literal["error", "skip", "truncate"]

COLUMNS: tuple[Column, ...] = get_args(Column)
GLOB_CHARS = frozenset("*?[")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSource(_Section):
    """One entry of `data.path`; a plain string is short for `{path: ...}`."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob, or a hub dataset id (`owner/name`)."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each of its training rows occurs in an epoch: 0.5 takes a seeded half of the rows, 2 each row twice."""
    format: DatasetFormat | Literal["auto"] | None = None  # None: data.format
    columns: dict[Column, str] | None = None  # None: data.columns
    split: str | None = None  # None: data.split
    name: str | None = None  # None: data.name
    revision: str | None = None  # None: data.revision


class DataConfig(_Section):
    """Where the rows come from and how many of them are held out."""

    path: list[DataSource] = Field(min_length=1)
    """Files (JSONL, JSON, CSV, TSV, Parquet, plain text), folders, globs or hub ids; one, or a list with weights."""
    format: DatasetFormat | Literal["auto"] = "auto"
    """`auto` decides per row, from its keys. `text` must be set explicitly: `auto` reads a `text` key as guanaco."""
    columns: dict[Column, str] = {}
    """Maps our column names to those of the dataset, such as `{prompt: question, completion: answer}`.

    Columns that are not listed are read under our names, such as `system`.
    """
    split: str = "train"
    """The split of a hub dataset."""
    name: str | None = None
    """The configuration of a hub dataset that has several: `name` of `datasets.load_dataset`."""
    revision: str | None = None
    """The commit, tag or branch of a hub dataset; None: the current main branch."""
    held_out: StrictInt | StrictFloat = Field(default=0.1, ge=0)
    """How much is held out for evaluation: a fraction of the rows (up to 0.5) or a number of rows (from 1).

    Conversations with the same first user message are never split up. For their sake fewer rows than the fraction may
    be held out, or a few more than the number.
    """
    split_seed: int = Field(default=0, ge=0, lt=2**32)
    """Selects the held-out rows. Separate from `seed`, so that runs with different seeds share their held-out rows."""
    held_out_path: list[DataSource] = []
    """Rows to evaluate on, instead of a part of `path`."""
    deduplicate: bool = True
    """Drop rows that duplicate an earlier one, ignoring whitespace."""
    on_bad_row: OnBadRow = "error"
    on_too_long: OnTooLong | None = None
    """For rows of more than `max_length` tokens; `truncate` drops a dialog's last exchanges. None: as `on_bad_row`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most this many rows, split evenly over the sources of `path`; longer ones make up for short ones."""

    @field_validator("path", "held_out_path", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str | Mapping | DataSource):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str | Mapping | DataSource) for item in value):
            raise ValueError("give a file, folder, glob or hub dataset id, or a list of {path: ..., weight: ...}")
        return [{"path": item} if isinstance(item, str) else item for item in value]

    @field_validator("held_out")
    @classmethod
    def _fraction_or_count(cls, value: float) -> float:
        if 0.5 < value < 1 or (value > 1 and value % 1):
            raise ValueError("give a fraction of the rows up to 0.5, or a whole number of rows")
        return value

    @field_validator("held_out_path")
    @classmethod
    def _unweighted(cls, value: list[DataSource]) -> list[DataSource]:
        if any(source.weight != 1 for source in value):
            raise ValueError("held-out sources take no weight: every row is evaluated once")
        return value

    @property
    def sources(self) -> list[DataSource]:
        """All sources, training sources first, with the defaults of `data` filled in."""
        return [
            source.model_copy(
                update={
                    "format": source.format or self.format,
                    "columns": self.columns if source.columns is None else source.columns,
                    "split": source.split or self.split,
                    "name": source.name or self.name,
                    "revision": source.revision or self.revision,
                }
            )
            for source in (*self.path, *self.held_out_path)
        ]

    @property
    def paths(self) -> list[str]:
        """The paths of the training sources, as given."""
        return [source.path for source in self.path]

    def with_absolute_paths(self) -> "DataConfig":
        """A copy for workers with another working directory; hub ids stay as they are."""

        def absolute(source: DataSource) -> DataSource:
            path = Path(source.path).expanduser()
            is_local = path.exists() or GLOB_CHARS & set(source.path)
            return source.model_copy(update={"path": str(path.absolute())}) if is_local else source

        return self.model_copy(
            update={
                "path": [absolute(source) for source in self.path],
                "held_out_path": [absolute(source) for source in self.held_out_path],
            }
        )
