"""DPO and KTO: losses against plain formulas, the reference, what is learned; resuming and stopping as for SFT."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.conftest import free_port
from training.base_models.nf4 import load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import PreferenceSettings, TrainConfig
from training.data.row_store import PreferenceRow, Rows, UnpairedRow
from training.data.run_inputs import RunInputs, read_inputs
from training.errors import TrainingError
from training.planning.plan import make_plan
from training.trainer.preference_losses import (
    HeldOutPreferences,
    ScoredPairs,
    completion_logps,
    dpo_losses,
    kto_losses,
    loss_at_reference,
)
from training.trainer.preference_trainer import preference_trainer
from training.trainer.qlora import start_adapter
from training.trainer.train import TrainResult, step_batches, train, training_arguments

WORDS = ["gate", "mule", "creek", "bell", "saddle", "barn", "truck", "stove"]


@dataclass
class Recorder:
    """A RunReporter that records its calls."""

    rank: int = 0
    steps: dict[int, Mapping[str, float]] = field(default_factory=dict)
    checkpoints: dict[int, list[str]] = field(default_factory=dict)
    keep: Path | None = None  # where the checkpoint of step 4 goes

    def on_phase(self, phase: str) -> None:
        pass

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        self.checkpoints[step] = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
        if self.keep and step == 4:
            directory.rename(self.keep)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is slower with more threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def config_of(method: str, tiny_base: BaseCheckpoint, tmp_path: Path, **changes: Any) -> TrainConfig:
    rows: list[dict[str, Any]] = []
    for number, word in enumerate(WORDS * 3):
        prompt = f"Where is the {word} number {number}?"
        polite, rude = f"The {word} is by post {number}, friend.", f"Find it yourself, {word} and all."
        if method == "dpo":
            rows.append({"prompt": prompt, "chosen": polite, "rejected": rude})
        else:
            rows += [{"prompt": prompt, "completion": polite, "label": True}]
            rows += [{"prompt": prompt, "completion": rude, "label": False}]
    path = tmp_path / f"{method}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(tiny_base.path),
            "adapter": "tiny",
            "method": method,
            "chat": {"default_system": "none"},  # the numbers below are those of short prompts
            "data": {"path": str(path), "held_out": 0.25},
            "quantization": {"compute_dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8},
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 5e-3,
            "max_length": 128,
            "save_steps": 4,
            "sample_prompts": 1,
            **changes,
        }
    )


def run(config: TrainConfig, folder: Path, recorder: Recorder, **options: Any) -> TrainResult:
    return train(
        config,
        recorder,
        adapter_dir=folder / "adapter",
        scratch_dir=folder / "scratch",
        device=torch.device("cpu"),
        **options,
    )


def shaken(config: TrainConfig) -> PeftModel:
    """The base with an adapter that changes its answers."""
    torch.manual_seed(1)
    model = start_adapter(load_quantized(read_inputs(config).base, config.quantization), config.lora)
    shake(model)
    return model


def shake(model: PeftModel) -> None:
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


@torch.no_grad()
def logp(model: PeftModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Token by token from the logits, one text at a time."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum((logps[len(prompt) - 1 + i, token] for i, token in enumerate(completion)), torch.tensor(0.0))


def trainer_for(config: TrainConfig, model: PeftModel, tmp_path: Path, inputs: RunInputs | None = None) -> Any:
    inputs = inputs or read_inputs(config)
    batches, layout = step_batches(config, inputs, 0, 1)
    arguments = training_arguments(config, model, tmp_path / "scratch", layout.accumulation)
    return preference_trainer(config, inputs, model, batches, arguments, [])


def first_step(trainer: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """The rows of the first step, which is one micro-batch, and its loss."""
    rows = [trainer.train_dataset[row] for row in next(iter(trainer.batches))]
    (batch,), num_rows = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return rows, trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_rows).detach()


def test_dpo_loss_of_a_batch_is_equation_7_with_the_base_as_reference(
    tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    config = config_of("dpo", tiny_base, tmp_path, preference={"beta": 0.3, "reference": "base"})
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, loss = first_step(trainer)
    expected = torch.tensor(0.0)
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        pi_w, pi_l = logp(model, prompt, chosen), logp(model, prompt, rejected)
        with model.disable_adapter():
            ref_w, ref_l = logp(model, prompt, chosen), logp(model, prompt, rejected)
        assert row["ref_chosen_logps"] == pytest.approx(float(ref_w), abs=1e-3)
        assert row["ref_rejected_logps"] == pytest.approx(float(ref_l), abs=1e-3)
        assert abs(float(pi_w - ref_w)) > 0.1  # the adapter does answer differently
        expected = expected - torch.log(torch.sigmoid(0.3 * (pi_w - ref_w) - 0.3 * (pi_l - ref_l))) / len(rows)
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_kto_loss_of_a_batch_is_the_papers_with_the_kl_of_mismatched_pairs(
    tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    config = config_of("kto", tiny_base, tmp_path, seed=3, preference={"beta": 0.3, "reference": "base", **weights})
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, loss = first_step(trainer)

    def ratio(prompt: list[int], completion: list[int]) -> torch.Tensor:
        policy = logp(model, prompt, completion)
        with model.disable_adapter():
            return policy - logp(model, prompt, completion)

    others = [row["KL_completion_ids"] for row in rows]
    kl = sum(ratio(row["prompt_ids"], other) for row, other in zip(rows, others, strict=True)) / 4
    kl = torch.clamp(torch.as_tensor(kl), min=0)
    values = []
    for row in rows:
        reward = ratio(row["prompt_ids"], row["completion_ids"])
        if row["label"]:
            values.append(1.5 * (1 - torch.sigmoid(0.3 * (reward - kl))))
        else:
            values.append(0.5 * (1 - torch.sigmoid(0.3 * (kl - reward))))
    assert {row["label"] for row in rows} == {True, False}
    assert float(loss) == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"])
def test_every_dpo_loss_that_is_evaluated_is_the_one_that_trains(
    tiny_base: BaseCheckpoint, tmp_path: Path, loss_type: str
) -> None:
    smoothing = 0.1 if loss_type == "robust" else 0.0
    preference = {"loss_type": loss_type, "label_smoothing": smoothing, "reference": "base"}
    config = config_of("dpo", tiny_base, tmp_path, preference=preference)
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, loss = first_step(trainer)
    trained = float(loss)
    pair_rows: list[PreferenceRow] = [
        {key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for row in rows  # type: ignore[misc]
    ]
    evaluated = HeldOutPreferences(model, config.preference, pair_rows).metrics(model)
    assert evaluated["eval_loss"] == pytest.approx(trained, abs=1e-4)
    assert evaluated["base_eval_loss"] == pytest.approx(loss_at_reference(config.preference, "dpo"))


def test_loss_at_the_reference_is_ln_2_and_half_the_weights() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert dpo_losses(PreferenceSettings(), zeros, zeros, ones, ones).tolist() == pytest.approx([math.log(2)] * 3)
    labels = torch.tensor([True, True, False])
    weights = PreferenceSettings(undesirable_weight=3.0)
    assert kto_losses(weights, zeros, labels, torch.tensor(0.0)).tolist() == pytest.approx([0.5, 0.5, 1.5])


def test_sequence_log_probability_does_not_depend_on_the_batch(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    config = config_of("dpo", tiny_base, tmp_path)
    model = shaken(config).eval()
    pairs = ScoredPairs(read_inputs(config).train_rows)
    together = completion_logps(model, pairs)
    expected = [float(logp(model, *pairs[at])) for at in range(5)]
    assert together[:5].tolist() == pytest.approx(expected, abs=1e-3)


def test_mismatched_completions_are_those_of_other_rows_each_once() -> None:
    rows: list[UnpairedRow] = [{"prompt_ids": [9], "completion_ids": [n], "label": True} for n in range(50)]
    pairs = ScoredPairs(rows)
    others = [pairs[len(rows) + at][1] for at in range(len(rows))]
    assert sorted(others) == [[n] for n in range(50)]
    assert all(other != [n] for n, other in enumerate(others))
    assert sum(abs(other[0] - n) == 1 for n, other in enumerate(others)) < 10  # a file's neighbours share prompts


@dataclass
class Reads:
    """How many token ids were read from a store, and how many of those are in memory still, or were at once."""

    read: int = 0
    alive: int = 0
    most_alive: int = 0


class _TokenIds(list[int]):
    def __init__(self, ids: list[int], reads: Reads) -> None:
        super().__init__(ids)
        self._reads = reads
        reads.read += len(self)
        reads.alive += len(self)
        reads.most_alive = max(reads.most_alive, reads.alive)

    def __del__(self) -> None:
        self._reads.alive -= len(self)


class _WatchedRows(Rows[Any]):
    def __init__(self, rows: Rows[Any], reads: Reads) -> None:
        super().__init__(rows.store, rows.numbers)
        self._reads = reads

    def __getitem__(self, at: Any) -> Any:
        row: dict[str, Any] = super().__getitem__(at)
        return {name: _TokenIds(ids, self._reads) if isinstance(ids, list) else ids for name, ids in row.items()}


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_rows_are_read_from_the_store_and_never_held_in_memory(
    tiny_base: BaseCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Data may be larger than memory: what is held are the tokens of a forward or micro-batch and those of the next."""
    monkeypatch.setattr("training.trainer.evaluate._BATCH_TOKENS", 256)
    config = config_of(method, tiny_base, tmp_path)
    inputs = read_inputs(config)
    reads = Reads()
    rows = _WatchedRows(Rows(inputs.train_rows.store, np.tile(inputs.train_rows.numbers, 5)), reads)
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path, replace(inputs, train_rows=rows))
    held_out = HeldOutPreferences(model, config.preference, rows)
    held_out.metrics(model)
    before = reads.read
    num_rows = sum(len(batch) for batch in trainer.get_train_dataloader())
    assert num_rows == len(rows)
    assert reads.read - before >= rows.num_tokens  # from the store, not from a copy that Arrow holds
    assert reads.most_alive < 600 < rows.num_tokens / 4
    assert reads.alive == 0  # with `trainer` and `held_out` there


def assert_same_run(
    recorder: Recorder, weights: dict[str, torch.Tensor], reference: Recorder, expected: dict[str, torch.Tensor]
) -> None:
    assert recorder.steps.keys() == reference.steps.keys()
    for step, metrics in reference.steps.items():
        for name in ("loss", "grad_norm", "rewards/margins")[: 3 if "rewards/accuracies" in metrics else 2]:
            assert recorder.steps[step][name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-4), (step, name)
    for name, weight in expected.items():  # Adam makes steps of the learning rate of whatever rounding leaves
        assert (weights[name] - weight).abs().mean() < 1e-3


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_step_is_train_batch_size_rows_however_they_are_divided(
    tiny_base: BaseCheckpoint, tmp_path: Path, method: str
) -> None:
    """Steps of 10, the last of an epoch shorter: a divisor of neither 8 nor 3."""
    settings = {"train_batch_size": 10, "max_steps": -1, "num_train_epochs": 2.0}
    reference = Recorder()
    config = config_of(method, tiny_base, tmp_path, per_device_train_batch_size=10, **settings)
    run(config, tmp_path / "whole", reference)
    inputs = read_inputs(config)
    assert len(reference.steps) == make_plan(config, inputs).num_steps == 2 * math.ceil(len(inputs.train_rows) / 10)
    for per_device in (8, 3):
        recorder = Recorder()
        config = config_of(method, tiny_base, tmp_path, per_device_train_batch_size=per_device, **settings)
        run(config, tmp_path / str(per_device), recorder)
        assert_same_run(
            recorder, trained_weights(tmp_path / str(per_device)), reference, trained_weights(tmp_path / "whole")
        )


_WORKER = """
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.trainer.test_preferences import Recorder, run
from training.config.train_config import TrainConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
for rows_a_step in map(int, sys.argv[2:]):
    folder = Path(sys.argv[1], str(rows_a_step), os.environ["RANK"])
    recorder = Recorder(dist.get_rank())
    config = TrainConfig.model_validate_json(Path(sys.argv[1], "config.json").read_text())
    run(config.model_copy(update={"train_batch_size": rows_a_step}), folder, recorder)
    (folder / "steps.json").write_text(json.dumps(recorder.steps))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_two_gloo_workers_are_one_worker_with_the_same_rows_a_step(
    tiny_base: BaseCheckpoint, tmp_path: Path, method: str
) -> None:
    """Steps of 7, and steps that leave one row for the last of an epoch: a worker has fewer rows, or none."""
    config = config_of(method, tiny_base, tmp_path, per_device_train_batch_size=2, sample_prompts=0)
    sizes = 7, len(read_inputs(config).train_rows) - 1
    config = config.model_copy(update={"max_steps": -1, "num_train_epochs": 1.0})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", _WORKER, str(tmp_path), *map(str, sizes)]
    workers = [subprocess.Popen(command, env=common | {"RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for size in sizes:
        reference = Recorder()
        run(config.model_copy(update={"train_batch_size": size}), tmp_path / f"one-{size}", reference)
        for rank in ("0", "1"):
            folder = tmp_path / str(size) / rank
            steps = {int(step): metrics for step, metrics in json.loads((folder / "steps.json").read_text()).items()}
            assert_same_run(
                Recorder(steps=steps), trained_weights(folder), reference, trained_weights(tmp_path / f"one-{size}")
            )


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_training_prefers_what_it_was_shown_and_keeps_adapters_in_float32(
    tiny_base: BaseCheckpoint, tmp_path: Path, method: str
) -> None:
    config = config_of(method, tiny_base, tmp_path, max_steps=16)
    recorder = Recorder()
    result = run(config, tmp_path, recorder)
    assert recorder.steps[1]["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=0.01)
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert result.metrics["eval_reward_margin"] > 0.3
    assert result.metrics["eval_preference_accuracy"] > 0.9
    if method == "dpo":  # a batch of KTO may hold one kind of row only, and has no margin then
        assert recorder.steps[16]["rewards/margins"] > recorder.steps[1]["rewards/margins"]
    assert not any(name.startswith("ref") for name in recorder.checkpoints[8])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert result.samples


@pytest.mark.promise("D13")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_resumed_run_equals_the_uninterrupted_one(tiny_base: BaseCheckpoint, tmp_path: Path, method: str) -> None:
    config = config_of(method, tiny_base, tmp_path)
    uninterrupted = Recorder(keep=tmp_path / "kept")
    result = run(config, tmp_path / "whole", uninterrupted)
    resumed = Recorder()
    resumed_result = run(config, tmp_path / "resumed", resumed, resume_from=tmp_path / "kept")
    assert list(resumed.steps) == [5, 6, 7, 8]
    for step in resumed.steps:
        assert resumed.steps[step]["loss"] == pytest.approx(uninterrupted.steps[step]["loss"], abs=1e-4)
    assert resumed_result.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)
    assert resumed_result.metrics["base_eval_loss"] == pytest.approx(result.metrics["base_eval_loss"], abs=1e-6)


@pytest.mark.promise("D15")
def test_diverged_preference_run_stops_with_step_and_reason(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    config = config_of("dpo", tiny_base, tmp_path, learning_rate=0.9, preference={"beta": 5.0}, max_grad_norm=1e4)
    with pytest.raises(
        TrainingError, match=r"training stopped at step \d+: the loss rose .* ten times the initial 0\.69"
    ):
        run(config, tmp_path, Recorder())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.promise("E5")
def test_answers_are_rendered_as_in_serving_and_end_with_the_turn(tiny_base: BaseCheckpoint, tmp_path: Path) -> None:
    inputs = read_inputs(config_of("dpo", tiny_base, tmp_path))
    row = cast(PreferenceRow, inputs.train_rows[0])
    decode = lambda ids: inputs.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert decode(row["chosen_ids"]).endswith("friend.<|im_end|>")
    assert decode(row["rejected_ids"]).startswith("Find it yourself")
