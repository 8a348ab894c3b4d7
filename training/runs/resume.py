"""Which directory a configuration's run has: a new one, or one to resume if nothing that matters has changed."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from training.config.load import recorded, resolved
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs
from training.errors import ConfigError
from training.runs.run_dir import RunDir, runs_address
from training.runs.run_lock import read_lock_holder

# What may change when a run is resumed: where it runs and what it reports, not what it computes.
_MAY_CHANGE = {
    "fsdp", "gate", "logging_steps", "max_failures", "num_workers", "price_per_hour", "report_to",
    "resources_per_worker", "run_name", "sample_prompts", "save_steps", "storage_path", "sweep", "use_gpu",
}  # fmt: skip
# What an attempt leaves besides its failure; removed before the next attempt unless the run has a result.
_ATTEMPT_FILES = ("sweep.json", "progress.json", "registered.json", "phases.json")


def resolve_run_dir(config: TrainConfig) -> RunDir:
    """The directory of the run that `config.run_name` names, or without one of a new run under a new name."""
    return RunDir(runs_address(config.storage_path), config.run_name or fresh_run_name(config))


def fresh_run_name(config: TrainConfig) -> str:
    """A unique name; names sort by creation time: [sweep-]ADAPTER-YYYYMMDD-HHMMSS-xxxx (UTC)."""
    return f"{config.run_name_prefix}{config.adapter}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def open_run(config: TrainConfig, run_dir: RunDir) -> TrainConfig:
    """Create the run's directory, or check that the run in it was started with the same configuration.

    Returns the configuration to continue with: a resumed run keeps its step size even if `num_workers` changed.

    Raises:
        ConfigError: a key that affects the result has changed.
    """
    current = {**resolved(config), "run_name": run_dir.name}
    previous = run_dir.read_json("config.json")
    if previous:
        previous = recorded(previous)
        for key in sorted((current.keys() | previous.keys()) - _MAY_CHANGE):
            if current.get(key) != previous.get(key):
                raise ConfigError(
                    f"run {run_dir.name!r} was started with {key}={previous.get(key)!r}, now {key} is "
                    f"{current.get(key)!r}: set it back to resume the run, or choose another run_name"
                )
        previous_config = type(config).model_validate(previous)
        if previous_config.step_size != config.step_size:
            changes = {"train_batch_size": previous_config.step_size, "gradient_accumulation_steps": 1}
            config = config.model_copy(update=changes)
    else:
        run_dir.write_json("config.json", current)
    run_dir.remove("failure.json", *(() if run_dir.read_json("result.json") else _ATTEMPT_FILES))
    return config


def is_finished(run_dir: RunDir) -> bool:
    """Whether the run has a result and no live process holds its lock."""
    if run_dir.read_json("result.json") is None:
        return False
    holder = read_lock_holder(run_dir)
    return holder is None or not holder.is_alive


def record_data_report(run_dir: RunDir, inputs: RunInputs) -> None:
    """Write the data report to `data.json`; a resumed run must read the same data as before.

    Raises:
        ConfigError: the data have changed.
    """
    sha256 = inputs.report.sha256
    previous_sha256 = (run_dir.read_json("data.json") or {}).get("sha256", sha256)
    if previous_sha256 != sha256:
        raise ConfigError(
            f"run {run_dir.name!r} was started on data with sha256 {previous_sha256[:12]}, data.path now has "
            f"{sha256[:12]}: put the files back to resume the run, or choose another run_name"
        )
    run_dir.write_json("data.json", inputs.report.model_dump(mode="json"))


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with paths made absolute, since workers have another working directory."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    return config.model_copy(
        update={"base_model": absolute(config.base_model), "data": config.data.with_absolute_paths()}
    )
