"""A run that was started before a key existed is resumed as it was started, or not at all."""

from pathlib import Path

import pytest

from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.errors import ConfigError
from training.runs.resume import open_run
from training.runs.run_dir import RunDir


def config_of(**chat: str) -> TrainConfig:
    return TrainConfig.model_validate({"adapter": "ranch", "data": {"path": "rows.jsonl"}, "chat": chat})


@pytest.mark.promise("F5")
def test_run_without_a_recorded_system_text_had_none(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path), "older")
    recorded = {**resolved(config_of()), "run_name": "older"}
    del recorded["chat"]
    run_dir.write_json("config.json", recorded)
    with pytest.raises(ConfigError, match=r"started with chat=\{'default_system': 'none'\}, now chat is .*template"):
        open_run(config_of(), run_dir)
    none = config_of(default_system="none")
    assert open_run(none, run_dir) == none
