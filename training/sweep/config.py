"""What a sweep is told: a training configuration, the keys to search, and how; and the trials that follow from it.

`training.sweep.run` runs what `plan` lists. The plan depends on nothing but the configuration: a sweep that is taken up
again knows its finished trials, and more `num_samples` only add to them. Imports neither torch nor Ray.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from training.config.load import build_config_of, explain, load_config, read_yaml
from training.config.train_config import TrainConfig
from training.errors import ConfigError

Value = bool | int | float | str | list[str]

# These decide what is measured, on what and where: trials that differ in them do not compare.
_NOT_SEARCHED = {
    "adapter", "base_model", "base_revision", "chat_format", "continue_from", "data", "gate", "max_failures",
    "max_length", "method", "num_workers", "quantization", "resources_per_worker", "run_name", "sample_prompts", "seed",
    "storage_path", "use_gpu",
}  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Domain(_Section):
    """The values of one key, by Ray Tune's names: exactly one of the five."""

    grid: list[Value] | None = Field(default=None, min_length=1)  # every value, with every value of the other grids
    choice: list[Value] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None  # the upper end is left out

    @model_validator(mode="after")
    def _one_of_them(self) -> "Domain":
        given = [name for name in Domain.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(Domain.model_fields)}, such as {{loguniform: [1e-4, 1e-2]}}"
            )
        ends = self.uniform or self.loguniform or self.randint
        if ends and not ends[0] < ends[1]:
            raise ValueError("the first end must be below the second")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs ends above 0")
        return self

    @property
    def examples(self) -> list[Value]:
        """Values that must be accepted if every drawn value is to be."""
        if self.randint:
            return [self.randint[0], self.randint[1] - 1]
        return [*(self.grid or self.choice or self.uniform or self.loguniform or ())]

    def draw(self, rng: random.Random) -> Value:
        """One value; floats to four digits, so that they can be read and typed."""
        if self.randint:
            return rng.randrange(*self.randint)
        if self.uniform:
            low, high = self.uniform
            return min(max(float(f"{rng.uniform(low, high):.4g}"), low), high)
        if self.loguniform:
            low, high = self.loguniform
            return min(max(float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}"), low), high)
        return rng.choice(self.choice or self.grid or [])


class SweepSettings(_Section):
    """How a search goes, by Ray Tune's names."""

    num_samples: int = Field(default=1, ge=1)  # draws of what is not a grid, for each point of the grids
    max_concurrent_trials: int | None = Field(default=None, ge=1)  # None: as many as there are resources for
    metric: Literal["eval_loss", "eval_preference_accuracy", "eval_reward_margin"] = "eval_loss"
    scheduler: Literal["fifo", "asha"] = "fifo"  # asha stops trials whose loss lags (arXiv:1810.05934)
    grace_period: int = Field(default=20, ge=1)  # of asha: steps before a trial may be stopped
    reduction_factor: int = Field(default=3, ge=2)  # of asha: one trial in so many goes on at each rung

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less of the metric is better, or more."""
        return "min" if self.metric == "eval_loss" else "max"


class SweepConfig(TrainConfig):
    """A training configuration with `search` (dotted keys and their domains) and `sweep`."""

    run_name_prefix: ClassVar[str] = "sweep-"

    search: dict[str, Domain]
    sweep: SweepSettings = SweepSettings()

    @field_validator("search")
    @classmethod
    def _search(cls, value: dict[str, Domain]) -> dict[str, Domain]:
        if not value:
            raise ValueError("name at least one key to search, such as learning_rate: {loguniform: [1e-4, 1e-2]}")
        return value


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the search: its number, the values of the searched keys, and the configuration with them."""

    number: int
    values: Mapping[str, Value]
    config: TrainConfig


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a `SweepConfig`, and make sure that every trial in it would be accepted.

    Raises:
        ConfigError: naming file, key and value.
    """
    config = build_config_of(SweepConfig, read_yaml(Path(path)), overrides, str(path))
    if config.num_workers != 1:
        raise ConfigError(f"{path}: num_workers is {config.num_workers}: a trial runs on one worker, leave it out")
    if config.data.held_out == 0:
        raise ConfigError(f"{path}: data.held_out is 0, but {config.sweep.metric} needs held-out rows: set it above 0")
    for key, domain in config.search.items():
        section = key.partition(".")[0]
        if section in _NOT_SEARCHED:
            raise ConfigError(f"{path}: search.{key}: trials that differ in {section} cannot be compared: leave it out")
        if section == "preference" and config.sweep.metric == "eval_loss":
            raise ConfigError(
                f"{path}: search.{key} changes what eval_loss is: set sweep.metric to eval_preference_accuracy"
            )
        for value in domain.examples:
            _trial_config(config, {key: value}, f"{path}: search")
    return config


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read what a YAML describes: a sweep where it has `search`, else one training.

    Raises:
        ConfigError: naming file, key and value.
    """
    return (load_sweep if "search" in read_yaml(Path(path)) else load_config)(path, overrides)


def plan(config: SweepConfig) -> list[Trial]:
    """Every trial, in order; a point that is drawn twice is listed once."""
    grids = {key: domain.grid for key, domain in config.search.items() if domain.grid}
    drawn = {key: domain for key, domain in config.search.items() if not domain.grid}
    points: list[dict[str, Value]] = []
    for sample in range(config.sweep.num_samples):
        for index, corner in enumerate(itertools.product(*grids.values())):
            point = dict(zip(grids, corner, strict=True))
            for key, domain in drawn.items():  # each draw has a seed of its own: others may come and go
                point[key] = domain.draw(random.Random(f"{config.seed}/{sample}/{index}/{key}"))
            if point not in points:
                points.append(point)
    return [Trial(number, point, _trial_config(config, point, "search")) for number, point in enumerate(points)]


def _trial_config(config: SweepConfig, point: Mapping[str, Value], source: str) -> TrainConfig:
    values = config.model_dump(exclude_unset=True, exclude={"search", "sweep", "run_name", "storage_path"})
    for key, value in point.items():
        *sections, leaf = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{source}: key {key!r} goes into {section!r}, which is no section")
        target[leaf] = value
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, set(), TrainConfig)) from None
