"""The directory that a configuration's run has: a new one, or one to resume, if nothing that matters has changed."""

import secrets
from datetime import UTC, datetime
from pathlib import Path

from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs
from training.errors import ConfigError
from training.home import corral_home
from training.runs.run_dir import RunDir
from training.runs.run_lock import read_lock_holder

# What may differ when a run is resumed: where and how watchfully it runs, not what it computes.
_MAY_CHANGE = {
    "fsdp", "gate", "logging_steps", "max_failures", "num_workers", "price_per_hour", "report_to",
    "resources_per_worker", "run_name", "sample_prompts", "save_steps", "storage_path", "sweep", "use_gpu",
}  # fmt: skip
# What an attempt leaves beside its failure; the next one begins without it, where the run has no result.
_OF_AN_ATTEMPT = ("sweep.json", "progress.json", "registered.json", "phases.json")


def run_dir_of(config: TrainConfig) -> RunDir:
    """The directory of the run that `config` names, or of a new one."""
    return RunDir(runs_dir(config), config.run_name or fresh_run_name(config))


def fresh_run_name(config: TrainConfig) -> str:
    """A name that no other run has, in order of time: [sweep-]ADAPTER-YYYYMMDD-HHMMSS-xxxx (UTC)."""
    return f"{config.run_name_prefix}{config.adapter}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def runs_dir(config: TrainConfig) -> str:
    """Where run directories lie: a path or an fsspec address."""
    if config.storage_path and "://" in config.storage_path:
        return config.storage_path
    return str(Path(config.storage_path).expanduser().absolute() if config.storage_path else corral_home() / "runs")


def open_run(config: TrainConfig, run_dir: RunDir) -> TrainConfig:
    """Make the run's directory, or make sure that the run in it was started with the same configuration.

    Returns the configuration to go on with: a resumed run keeps the size of its steps if `num_workers` is another.
    """
    told = {**resolved(config), "run_name": run_dir.name}
    before = run_dir.read_json("config.json")
    if before:
        for key in sorted((told.keys() | before.keys()) - _MAY_CHANGE):
            if told.get(key) != before.get(key):
                raise ConfigError(
                    f"run {run_dir.name!r} was started with {key}={before.get(key)!r}, now {key} is "
                    f"{told.get(key)!r}: set it back to resume the run, or choose another run_name"
                )
        started_with = type(config).model_validate(before)
        if started_with.step_size != config.step_size:
            changes = {"train_batch_size": started_with.step_size, "gradient_accumulation_steps": 1}
            config = config.model_copy(update=changes)
    else:
        run_dir.write_json("config.json", told)
    run_dir.remove("failure.json", *(() if run_dir.read_json("result.json") else _OF_AN_ATTEMPT))
    return config


def is_over(run_dir: RunDir) -> bool:
    """Whether the run was trained to its end and nobody drives it any more."""
    if run_dir.read_json("result.json") is None:
        return False
    driver = read_lock_holder(run_dir)
    return driver is None or not driver.is_alive


def record_data(run_dir: RunDir, inputs: RunInputs) -> None:
    """Write what was found in the data, or make sure that a resumed run finds the same."""
    before = (run_dir.read_json("data.json") or {}).get("sha256", inputs.report.sha256)
    if before != inputs.report.sha256:
        raise ConfigError(
            f"run {run_dir.name!r} was started on data with sha256 {before[:12]}, data.path now has "
            f"{inputs.report.sha256[:12]}: put the files back to resume the run, or choose another run_name"
        )
    run_dir.write_json("data.json", inputs.report.model_dump(mode="json"))


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers have another working directory: what is a path here is made absolute."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    return config.model_copy(
        update={"base_model": absolute(config.base_model), "data": config.data.with_absolute_paths()}
    )
