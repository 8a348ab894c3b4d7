"""`auto` batch sizes and gradient checkpointing: decided by memory, without changing a step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import TrainConfig
from training.data.run_inputs import RunInputs, read_inputs
from training.errors import TrainingError
from training.planning.batch_size import decide
from training.planning.memory import TrainStep, estimate


@pytest.fixture
def config(tiny_base: BaseCheckpoint, tmp_path: Path) -> TrainConfig:
    dataset = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Ask {n}", "completion": "so " * (n % 40 + 1)} for n in range(64)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(tiny_base.path),
            "adapter": "tiny",
            "data": {"path": str(dataset)},
            "per_device_train_batch_size": "auto",
            "train_batch_size": 32,
            "max_length": 128,
        }
    )


@pytest.fixture
def inputs(config: TrainConfig, tmp_path: Path) -> RunInputs:
    """The rows of the tiny model, for a base of 7B shapes: nothing is loaded."""
    shapes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(shapes | {"vocab_size": 32000}))
    return replace(read_inputs(config), base=BaseCheckpoint("llama", "llama", tmp_path, None))


def bytes_for(config: TrainConfig, inputs: RunInputs, batch_size: int, checkpointing: bool) -> int:
    step = TrainStep.of(
        config.model_copy(update={"gradient_checkpointing": checkpointing}),
        max_length=int(inputs.train_rows.lengths.max()),
        compute_dtype="bfloat16",
        on_gpu=True,
        gradient_accumulation_steps=2,
        labelled_share=inputs.report.trained_share,
    )
    return estimate(inputs.base.llama_config(), step, batch_size).total_bytes


def chosen(config: TrainConfig, inputs: RunInputs, free_bytes: int) -> tuple[int, bool]:
    decided = decide(config, inputs, free_bytes, on_gpu=True, compute_dtype="bfloat16")
    assert decided.step_size == config.step_size == 32
    assert isinstance(decided.gradient_checkpointing, bool)
    return decided.micro_batch_size, decided.gradient_checkpointing


def test_with_room_enough_a_worker_takes_its_whole_part_of_a_step(config: TrainConfig, inputs: RunInputs) -> None:
    assert chosen(config, inputs, 10**12) == (32, False)
    two_workers = config.model_copy(update={"num_workers": 2})
    assert chosen(two_workers, inputs, 10**12) == (16, False)


def test_with_less_room_it_checkpoints_and_then_takes_fewer_at_once(config: TrainConfig, inputs: RunInputs) -> None:
    num_bytes = bytes_for(config, inputs, 32, False)
    assert bytes_for(config, inputs, 32, True) < num_bytes - 1
    assert chosen(config, inputs, num_bytes) == (32, False)
    assert chosen(config, inputs, num_bytes - 1) == (32, True)
    assert chosen(config, inputs, bytes_for(config, inputs, 4, True)) == (4, True)


def test_a_given_batch_stays_and_only_checkpointing_is_decided(config: TrainConfig, inputs: RunInputs) -> None:
    config = config.model_copy(update={"per_device_train_batch_size": 12})
    assert chosen(config, inputs, bytes_for(config, inputs, 16, False)) == (12, False)
    assert chosen(config, inputs, bytes_for(config, inputs, 2, False)) == (12, True)


def test_what_cannot_fit_is_said_with_both_numbers(config: TrainConfig, inputs: RunInputs) -> None:
    with pytest.raises(TrainingError, match=r"one example of \d+ tokens needs \d+\.\d GiB, but only 0\.0 GiB are free"):
        chosen(config, inputs, 1000)
