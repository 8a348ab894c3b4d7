"""The training loop of one worker, without Ray."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import TrainConfig
from training.data.row_store import IGNORED_LABEL
from training.data.run_inputs import read_inputs
from training.errors import TrainingError
from training.trainer.callback import TrainingCallback
from training.trainer.evaluate import held_out_loss
from training.trainer.qlora import adapters_to_float32, attach_lora
from training.trainer.train import TrainResult, step_batches, train

PROJECT = Path(__file__).parents[3]


@dataclass
class Recorder:
    """A RunReporter that records its calls."""

    rank: int = 0
    phases: list[str] = field(default_factory=list)
    steps: dict[int, Mapping[str, float]] = field(default_factory=dict)
    checkpoints: dict[int, list[str]] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def on_phase(self, phase: str) -> None:
        self.phases.append(phase)

    def on_log(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        self.checkpoints[step] = sorted(path.name for path in directory.iterdir())
        self.dtypes |= {tensor.dtype for tensor in load_file(directory / "adapter_model.safetensors").values()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is slower with more threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def config(tiny_base: BaseCheckpoint, tmp_path: Path) -> TrainConfig:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Ask {n}" + " please" * (n % 7)},
                {"role": "assistant", "content": a},
            ]
        }
        for n in range(30)
        for a in [f"The answer is {n % 3}."]
    ]
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig.model_validate(
        {
            "base_model": str(tiny_base.path),
            "adapter": "tiny",
            "data": {"path": str(dataset), "held_out": 0.2},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "per_device_train_batch_size": 4,
            "max_steps": 10,
            "learning_rate": 5e-3,
            "max_length": 128,
            "save_steps": 5,
            "sample_prompts": 2,
        }
    )


def run(
    config: TrainConfig, tmp_path: Path, name: str, resume_from: Path | None = None
) -> tuple[Recorder, TrainResult]:
    recorder = Recorder()
    result = train(
        config,
        recorder,
        adapter_dir=tmp_path / name / "adapter",
        scratch_dir=tmp_path / name / "scratch",
        device=torch.device("cpu"),
        resume_from=resume_from,
    )
    return recorder, result


def test_run_from_base_to_adapter(config: TrainConfig, tmp_path: Path) -> None:
    recorder, result = run(config, tmp_path, "one")
    assert list(recorder.steps) == list(range(1, 11))
    assert recorder.steps[1]["loss"] > recorder.steps[10]["loss"]
    assert set(recorder.checkpoints) == {5, 10}
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(recorder.checkpoints[5])
    assert recorder.dtypes == {torch.float32}
    assert result.metrics["num_steps"] == 10
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert [sample.reference[:13] for sample in result.samples] == ["The answer is"] * 2
    tensors = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not list((tmp_path / "one" / "adapter").glob("*.bin"))


@pytest.mark.promise("D13")
def test_run_resumed_from_a_checkpoint_equals_the_uninterrupted_one(config: TrainConfig, tmp_path: Path) -> None:
    checkpoint_dir = tmp_path / "kept"
    uninterrupted = Keeper(5, checkpoint_dir)
    result = whole_run(config, uninterrupted, tmp_path)
    resumed, again = run(config, tmp_path, "resumed", resume_from=checkpoint_dir)
    assert list(resumed.steps) == list(range(6, 11))
    for step in resumed.steps:
        assert resumed.steps[step]["loss"] == pytest.approx(uninterrupted.steps[step]["loss"], abs=1e-4)
    assert again.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)
    assert resumed.dtypes == {torch.float32}


class Keeper(Recorder):
    """Keeps the checkpoint of one step."""

    def __init__(self, step: int, checkpoint_dir: Path) -> None:
        super().__init__()
        self._step, self._kept = step, checkpoint_dir

    def on_checkpoint(self, directory: Path, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._step:
            shutil.copytree(directory, self._kept)


def whole_run(config: TrainConfig, recorder: Recorder, tmp_path: Path) -> TrainResult:
    return train(config, recorder, adapter_dir=tmp_path / "a", scratch_dir=tmp_path / "s", device=torch.device("cpu"))


@pytest.mark.promise("D13")
def test_run_resumed_after_its_last_step_takes_no_other(config: TrainConfig, tmp_path: Path) -> None:
    result = whole_run(config, Keeper(10, tmp_path / "kept"), tmp_path)
    resumed, again = run(config, tmp_path, "resumed", resume_from=tmp_path / "kept")
    assert resumed.steps == {}
    assert again.adapter_sha256 == result.adapter_sha256
    assert again.metrics | {"train_s": 0.0} == result.metrics | {"train_s": 0.0}


def test_run_stops_early_and_stays_stopped_when_resumed(config: TrainConfig, tmp_path: Path) -> None:
    early = {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 9.0, "save_steps": 6}
    config = config.model_copy(update=early)
    stopped = Keeper(6, tmp_path / "kept")
    result = whole_run(config, stopped, tmp_path)
    assert max(stopped.steps) == result.metrics["num_steps"] == 6  # nothing is 9 nats better than the first at step 2
    resumed, again = run(config, tmp_path, "resumed", resume_from=tmp_path / "kept")
    assert resumed.steps == {}
    assert again.adapter_sha256 == result.adapter_sha256


def test_best_of_the_evaluated_steps_is_published_the_last_step_among_them(config: TrainConfig, tmp_path: Path) -> None:
    best = {"eval_steps": 3, "load_best_model_at_end": True}
    recorder, result = run(config.model_copy(update=best), tmp_path, "best")
    losses = {step: metrics["eval_loss"] for step, metrics in recorder.steps.items() if "eval_loss" in metrics}
    assert list(losses) == [3, 6, 9, 10]
    assert result.metrics["best_step"] == min(losses, key=losses.__getitem__)
    assert result.metrics["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-5)


def test_weights_of_the_lowest_held_out_loss_come_back(config: TrainConfig) -> None:
    inputs = read_inputs(config)
    model = attach_lora(load_quantized(inputs.base, config.quantization, "cpu"), config.lora)
    losses = iter([3.0, 1.0, 2.0])
    config = config.model_copy(update={"eval_steps": 2, "load_best_model_at_end": True})
    callback = TrainingCallback(config, Recorder(), 9.0, "nothing", lambda _: {"eval_loss": next(losses)})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in trained:
                parameter.fill_(step)
        state = TrainerState(global_step=step, max_steps=9)
        callback.on_step_end(TrainingArguments(use_cpu=True), state, TrainerControl(), model=model)
    assert callback.restore_best(model) == {"best_step": 4.0}
    assert all((parameter == 4).all() for parameter in trained)


def test_trl_given_the_same_order_and_first_weights_has_the_same_loss_at_every_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    """One epoch by TRL and by Corral differ only by random draws."""
    without_dropout = config.lora.model_copy(update={"lora_dropout": 0.0})
    in_float32 = config.quantization.model_copy(update={"compute_dtype": "float32"})
    config = config.model_copy(update={"lora": without_dropout, "quantization": in_float32, "max_steps": 6})
    recorder, result = run(config, tmp_path, "ours")

    inputs = read_inputs(config)
    batches, _ = step_batches(config, inputs, 0, 1)
    rows = [dict(inputs.train_rows[row]) for step in batches.steps() for row in step]
    set_seed(config.seed)
    trainer = _InOrder(
        model=attach_lora(load_quantized(inputs.base, config.quantization, "cpu"), config.lora),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=config.step_size,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            seed=config.seed,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(inputs.base.path),
    )
    adapters_to_float32(trainer.model)  # TRL has made them bfloat16
    trainer.train()

    theirs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [recorder.steps[step]["loss"] for step in range(1, 7)] == pytest.approx(theirs, abs=1e-3)
    trained = held_out_loss(trainer.model.eval(), inputs.held_out_rows)[0]
    assert result.metrics["eval_loss"] == pytest.approx(trained, abs=1e-3)


class _InOrder(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.mark.promise("E4")
def test_adapter_folder_is_a_plain_peft_adapter(config: TrainConfig, tmp_path: Path) -> None:
    _, result = run(config, tmp_path, "one")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one" / "adapter", local_files_only=True)
    assert loaded.peft_config["default"].r == 4
    assert math.isfinite(result.metrics["eval_loss"])


def test_held_out_loss_is_that_of_single_rows_and_labelled_tokens_only(config: TrainConfig) -> None:
    inputs = read_inputs(config)
    model = attach_lora(load_quantized(inputs.base, Quantization()), config.lora).eval()
    total, count = 0.0, 0
    for row in inputs.held_out_rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labelled = labels != IGNORED_LABEL
        total += F.cross_entropy(logits[labelled], labels[labelled], reduction="sum").item()
        count += int(labelled.sum())
    loss, num_tokens = held_out_loss(model, inputs.held_out_rows)
    assert num_tokens == count
    assert loss == pytest.approx(total / count, rel=2e-3)


@pytest.mark.promise("E5")
def test_labels_are_the_assistants_text_and_end_of_turn(config: TrainConfig) -> None:
    inputs = read_inputs(config)
    row = inputs.train_rows[0]
    labelled = [token_id for token_id in row["labels"] if token_id != IGNORED_LABEL]
    text = inputs.tokenizer.decode(labelled, skip_special_tokens=False)
    assert text.startswith("The answer is ")
    assert text.removesuffix("<|im_end|>").endswith(".")


@pytest.mark.promise("D15")
def test_diverged_run_stops_naming_step_and_reason(config: TrainConfig, tmp_path: Path) -> None:
    wild = config.model_copy(update={"lora": config.lora.model_copy(update={"lora_alpha": 10**38})})
    with pytest.raises(TrainingError, match=r"training stopped at step 1: the (loss|gradient norm) became (inf|nan)"):
        run(wild, tmp_path, "wild")
    assert not (tmp_path / "wild" / "adapter").exists()


@pytest.mark.promise("D15")
@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "step 7: the loss became nan: lower learning_rate (0.005) or max_grad_norm (1)"),
        (math.inf, 1.0, "step 7: the loss became inf: "),
        (2.0, math.nan, "step 7: the gradient norm became nan: "),
        (25.0, 1.0, "step 7: the loss rose to 25.0, more than twice that of random guessing: "),
    ],
)
def test_every_kind_of_divergence_is_named(config: TrainConfig, loss: float, grad_norm: float, reason: str) -> None:
    recorder = Recorder()
    callback = TrainingCallback(config, recorder, 2 * math.log(49152), "twice that of random guessing")
    logs = {"loss": loss, "grad_norm": grad_norm, "learning_rate": 0.1, "epoch": 1.0, "num_tokens": 10.0}
    with pytest.raises(TrainingError, match=re.escape(f"training stopped at {reason}")) as caught:
        callback.on_log(TrainingArguments(use_cpu=True), TrainerState(global_step=7), TrainerControl(), logs)
    assert "\n" not in str(caught.value)
    assert not recorder.steps


def test_overflow_in_float16_is_a_skipped_step_and_no_divergence(config: TrainConfig) -> None:
    recorder = Recorder()
    callback = TrainingCallback(config, recorder, 2 * math.log(49152), "twice that of random guessing")
    in_float16 = TrainingArguments(use_cpu=True)
    in_float16.fp16 = True  # which transformers refuses on a CPU
    logs = {"loss": 2.0, "grad_norm": math.inf, "learning_rate": 0.1, "epoch": 1.0, "num_tokens": 10.0}
    for step in range(16):
        callback.on_log(in_float16, TrainerState(global_step=step), TrainerControl(), logs)
    with pytest.raises(TrainingError, match="the gradient norm became inf"):
        callback.on_log(in_float16, TrainerState(global_step=17), TrainerControl(), logs)


def test_worker_code_does_not_know_ray() -> None:
    script = "import sys, training.trainer.train; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
