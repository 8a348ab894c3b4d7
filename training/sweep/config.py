"""The configuration of a sweep: a training configuration, the keys to search, and how; and its plan of trials.

The plan depends only on the configuration: a resumed sweep recognizes its finished trials, and a larger `num_samples`
only adds to them. Imports neither torch nor Ray.
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

# These determine what is measured, on which data and where: trials that differ in them cannot be compared.
_NOT_SEARCHED = {
    "adapter", "base_model", "base_revision", "chat", "chat_format", "continue_from", "data", "gate", "max_failures",
    "max_length", "method", "num_workers", "quantization", "resources_per_worker", "run_name", "sample_prompts", "seed",
    "storage_path", "use_gpu",
}  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Domain(_Section):
    """The values of one key, by the names of Ray Tune: exactly one of the five."""

    grid: list[Value] | None = Field(default=None, min_length=1)  # every combination with the other grids
    choice: list[Value] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None  # the upper bound is exclusive

    @model_validator(mode="after")
    def _check_domain(self) -> "Domain":
        names = [name for name in Domain.model_fields if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(Domain.model_fields)}, such as {{loguniform: [1e-4, 1e-2]}}"
            )
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError("the lower bound must be below the upper bound")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("the bounds of loguniform must be above 0")
        return self

    @property
    def examples(self) -> list[Value]:
        """Values to validate: if all of them are valid, so is every drawn value."""
        if self.randint:
            return [self.randint[0], self.randint[1] - 1]
        return [*(self.grid or self.choice or self.uniform or self.loguniform or ())]

    def draw(self, rng: random.Random) -> Value:
        """One value; floats are rounded to four digits, which are easier to read and type."""
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
    """The settings of a search, by the names of Ray Tune."""

    num_samples: int = Field(default=1, ge=1)  # draws of the other domains, for each point of the grids
    max_concurrent_trials: int | None = Field(default=None, ge=1)  # None: as many as the resources allow
    metric: Literal["eval_loss", "eval_preference_accuracy", "eval_reward_margin"] = "eval_loss"
    scheduler: Literal["fifo", "asha"] = "fifo"  # asha stops trials whose loss lags (arXiv:1810.05934)
    grace_period: int = Field(default=20, ge=1)  # of asha: steps before a trial may be stopped
    reduction_factor: int = Field(default=3, ge=2)  # of asha: one trial in so many continues at each rung

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a lower or a higher metric is better."""
        return "min" if self.metric == "eval_loss" else "max"


class SweepConfig(TrainConfig):
    """A training configuration with `search` (dotted keys and their domains) and `sweep`."""

    run_name_prefix: ClassVar[str] = "sweep-"

    search: dict[str, Domain]
    sweep: SweepSettings = SweepSettings()

    @field_validator("search")
    @classmethod
    def _check_search(cls, value: dict[str, Domain]) -> dict[str, Domain]:
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
    """Read a `SweepConfig`, and check that every trial in it is valid.

    Raises:
        ConfigError: it is not valid; names file, key and value.
    """
    config = build_config_of(SweepConfig, read_yaml(Path(path)), overrides, str(path))
    if config.num_workers != 1:
        raise ConfigError(f"{path}: num_workers is {config.num_workers}: a trial runs on one worker: remove it")
    if config.data.held_out == 0:
        raise ConfigError(f"{path}: data.held_out is 0, but {config.sweep.metric} needs held-out rows: set it above 0")
    for key, domain in config.search.items():
        section = key.partition(".")[0]
        if section in _NOT_SEARCHED:
            raise ConfigError(f"{path}: search.{key}: trials that differ in {section} cannot be compared: remove it")
        if section == "preference" and config.sweep.metric == "eval_loss":
            raise ConfigError(f"{path}: search.{key} redefines eval_loss: set sweep.metric to eval_preference_accuracy")
        for value in domain.examples:
            _trial_config(config, {key: value}, f"{path}: search")
    return config


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file: a sweep if it has `search`, else a single run.

    Raises:
        ConfigError: it is not valid; names file, key and value.
    """
    return (load_sweep if "search" in read_yaml(Path(path)) else load_config)(path, overrides)


def plan(config: SweepConfig) -> list[Trial]:
    """All trials, in order; a point that is drawn twice is listed once."""
    grids = {key: domain.grid for key, domain in config.search.items() if domain.grid}
    random_domains = {key: domain for key, domain in config.search.items() if not domain.grid}
    points: list[dict[str, Value]] = []
    for sample in range(config.sweep.num_samples):
        for index, grid_values in enumerate(itertools.product(*grids.values())):
            point = dict(zip(grids, grid_values, strict=True))
            for key, domain in random_domains.items():  # each draw has its own seed, independent of other keys
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
                raise ConfigError(f"{source}: key {key!r}: {section!r} is not a section: use an existing key")
        target[leaf] = value
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, set(), TrainConfig)) from None
