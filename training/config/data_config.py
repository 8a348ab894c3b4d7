"""`data:` of a training configuration: which rows, in which format, how many held out. Light: imports pydantic only.

`training.config.train_config` makes it part of `TrainConfig`; `training.data.prepare` reads what it names.
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
RowKind = Literal["sft", "preference", "unpaired_preference"]  # what a method trains on
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
    """One entry of `data.path`; a plain string is a source with nothing but its path."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob, or a hub dataset id (`owner/name`)."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often an epoch takes the source's training rows: 0.5 is a seeded half of them, 2 is each of them twice."""
    format: DatasetFormat | Literal["auto"] | None = None  # None: data.format
    columns: dict[Column, str] | None = None  # None: data.columns
    split: str | None = None  # None: data.split
    name: str | None = None  # None: data.name
    revision: str | None = None  # None: data.revision


class DataConfig(_Section):
    """Where the rows come from and how much of them is held out."""

    path: list[DataSource] = Field(min_length=1)
    """Files (JSONL, JSON, CSV, TSV, Parquet, plain text), folders, globs, hub ids; one, or a list with weights."""
    format: DatasetFormat | Literal["auto"] = "auto"
    """`auto` decides row by row from the keys. `text` must be asked for: under `auto` a text is a guanaco dialog."""
    columns: dict[Column, str] = {}
    """Where a row has its parts under other names, such as `{prompt: question, completion: answer}`.

    A part that is not named here is read under its own name, such as a column `system`.
    """
    split: str = "train"
    """The split of a hub dataset."""
    name: str | None = None
    """The configuration of a hub dataset that has several, as `datasets.load_dataset` calls it."""
    revision: str | None = None
    """The commit, tag or branch of a hub dataset; None: its main branch as it is now."""
    held_out: StrictInt | StrictFloat = Field(default=0.1, ge=0)
    """What is kept for evaluation: up to 0.5 a share of the rows, from 1 on a number of rows.

    Conversations with the same first user message are never divided: a share is not exceeded for them, a number is
    reached, with a few more rows where it takes them.
    """
    split_seed: int = Field(default=0, ge=0, lt=2**32)
    """Chooses which rows are held out; not `seed`, so that runs with several seeds are compared on the same rows."""
    held_out_path: list[DataSource] = []
    """Rows to evaluate on, instead of a share of `path`."""
    deduplicate: bool = True
    """Drop a row that says the same as an earlier one, whitespace aside."""
    on_bad_row: OnBadRow = "error"
    on_too_long: OnTooLong | None = None
    """A row of more than `max_length` tokens; `truncate` drops a dialog's last exchanges. None: as `on_bad_row`."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only that many rows, of each source of `path` equally many as far as it has them."""

    @field_validator("path", "held_out_path", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str | Mapping | DataSource):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str | Mapping | DataSource) for item in value):
            raise ValueError("name a file, a folder, a glob or a hub dataset id, or a list of {path: ..., weight: ...}")
        return [{"path": item} if isinstance(item, str) else item for item in value]

    @field_validator("held_out")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if 0.5 < value < 1 or (value > 1 and value % 1):
            raise ValueError("write a share of the rows up to 0.5, or a whole number of rows")
        return value

    @field_validator("held_out_path")
    @classmethod
    def _unweighted(cls, value: list[DataSource]) -> list[DataSource]:
        if any(source.weight != 1 for source in value):
            raise ValueError("held-out rows have no weight: every one of them is evaluated once")
        return value

    @property
    def sources(self) -> list[DataSource]:
        """Everything that is read, training sources first, with what `data` says filled in."""
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
        """The training sources as they were named."""
        return [source.path for source in self.path]

    def with_absolute_paths(self) -> "DataConfig":
        """The same for a worker with another working directory; hub ids stay as they are."""

        def absolute(source: DataSource) -> DataSource:
            path = Path(source.path).expanduser()
            local = path.exists() or GLOB_CHARS & set(source.path)
            return source.model_copy(update={"path": str(path.absolute())}) if local else source

        return self.model_copy(
            update={
                "path": [absolute(source) for source in self.path],
                "held_out_path": [absolute(source) for source in self.held_out_path],
            }
        )
