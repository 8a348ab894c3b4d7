"""DPO and KTO: losses against plain formulas, the reference, what is learned; runs resume and stop as any other."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from training.base_models import BaseModel, load_quantized
from training.config import PreferenceSettings, TrainConfig
from training.errors import TrainingError
from training.inputs import read_inputs
from training.preference_trainer import preference_trainer
from training.preferences import (
    HeldOutPreferences,
    completion_logps,
    dpo_losses,
    kto_losses,
    loss_at_reference,
    mismatched_completions,
)
from training.qlora import start_adapter
from training.row_store import PreferenceRow, UnpairedRow
from training.sft import SftResult, train, training_arguments

WORDS = ["gate", "mule", "creek", "bell", "saddle", "barn", "truck", "stove"]


@dataclass
class Recorder:
    """A Run that remembers."""

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
    """For so small a model more threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def config_of(method: str, tiny_base: BaseModel, tmp_path: Path, **changes: Any) -> TrainConfig:
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


def run(config: TrainConfig, folder: Path, recorder: Recorder, **options: Any) -> SftResult:
    return train(
        config,
        recorder,
        adapter_dir=folder / "adapter",
        scratch_dir=folder / "scratch",
        device=torch.device("cpu"),
        **options,
    )


def shaken(config: TrainConfig) -> PeftModel:
    """The base with an adapter that says something else than the base does."""
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


def trainer_for(config: TrainConfig, model: PeftModel, tmp_path: Path) -> Any:
    arguments = training_arguments(config, model, tmp_path / "scratch", 1)
    return preference_trainer(config, read_inputs(config), model, arguments, [])


def first_batch(trainer: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [dict(trainer.train_dataset[i]) for i in range(4)]
    return rows, trainer.data_collator(rows)


def test_dpo_loss_of_a_batch_is_equation_7_with_the_base_as_reference(tiny_base: BaseModel, tmp_path: Path) -> None:
    config = config_of("dpo", tiny_base, tmp_path, preference={"beta": 0.3, "reference": "base"})
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    expected = torch.tensor(0.0)
    for row in rows:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        pi_w, pi_l = logp(model, prompt, chosen), logp(model, prompt, rejected)
        with model.disable_adapter():
            ref_w, ref_l = logp(model, prompt, chosen), logp(model, prompt, rejected)
        assert row["ref_chosen_logps"] == pytest.approx(float(ref_w), abs=1e-3)
        assert row["ref_rejected_logps"] == pytest.approx(float(ref_l), abs=1e-3)
        assert abs(float(pi_w - ref_w)) > 0.1  # the adapter does speak differently
        expected = expected - torch.log(torch.sigmoid(0.3 * (pi_w - ref_w) - 0.3 * (pi_l - ref_l))) / len(rows)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-4)


def test_kto_loss_of_a_batch_is_the_papers_with_the_kl_of_mismatched_pairs(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    config = config_of("kto", tiny_base, tmp_path, seed=3, preference={"beta": 0.3, "reference": "base", **weights})
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)

    def ratio(prompt: list[int], completion: list[int]) -> torch.Tensor:
        policy = logp(model, prompt, completion)
        with model.disable_adapter():
            return policy - logp(model, prompt, completion)

    others = [rows[i - 1]["completion_ids"] for i in range(4)]
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
    assert float(loss.detach()) == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"])
def test_every_dpo_loss_that_is_evaluated_is_the_one_that_trains(
    tiny_base: BaseModel, tmp_path: Path, loss_type: str
) -> None:
    smoothing = 0.1 if loss_type == "robust" else 0.0
    preference = {"loss_type": loss_type, "label_smoothing": smoothing, "reference": "base"}
    config = config_of("dpo", tiny_base, tmp_path, preference=preference)
    model = shaken(config)
    trainer = trainer_for(config, model, tmp_path)
    rows, batch = first_batch(trainer)
    trained = float(trainer.compute_loss(trainer.model, batch).detach())
    kept: list[PreferenceRow] = [
        {key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for row in rows  # type: ignore[misc]
    ]
    evaluated = HeldOutPreferences(model, config.preference, kept).metrics(model)
    assert evaluated["eval_loss"] == pytest.approx(trained, abs=1e-4)
    assert evaluated["base_eval_loss"] == pytest.approx(loss_at_reference(config.preference, "dpo"))


def test_loss_at_the_reference_is_ln_2_and_half_the_weights() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert dpo_losses(PreferenceSettings(), zeros, zeros, ones, ones).tolist() == pytest.approx([math.log(2)] * 3)
    labels = torch.tensor([True, True, False])
    weights = PreferenceSettings(undesirable_weight=3.0)
    assert kto_losses(weights, zeros, labels, torch.tensor(0.0)).tolist() == pytest.approx([0.5, 0.5, 1.5])


def test_sequence_log_probability_does_not_depend_on_the_batch(tiny_base: BaseModel, tmp_path: Path) -> None:
    config = config_of("dpo", tiny_base, tmp_path)
    model = shaken(config).eval()
    pairs = [(row["prompt_ids"], row["chosen_ids"]) for row in cast(Any, read_inputs(config).train_rows)]
    together = completion_logps(model, pairs)
    alone = [float(logp(model, prompt, completion)) for prompt, completion in pairs[:5]]
    assert together[:5].tolist() == pytest.approx(alone, abs=1e-3)


def test_mismatched_completions_are_those_of_the_same_batch() -> None:
    rows: list[UnpairedRow] = [{"prompt_ids": [9], "completion_ids": [n], "label": True} for n in range(5)]
    assert mismatched_completions(rows, 2) == [[1], [0], [3], [2], [4]]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_training_prefers_what_it_was_shown_and_keeps_adapters_in_float32(
    tiny_base: BaseModel, tmp_path: Path, method: str
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


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_d13_resumed_run_equals_the_uninterrupted_one(tiny_base: BaseModel, tmp_path: Path, method: str) -> None:
    config = config_of(method, tiny_base, tmp_path)
    whole = Recorder(keep=tmp_path / "kept")
    result = run(config, tmp_path / "whole", whole)
    resumed = Recorder()
    again = run(config, tmp_path / "resumed", resumed, resume_from=tmp_path / "kept")
    assert list(resumed.steps) == [5, 6, 7, 8]
    for step in resumed.steps:
        assert resumed.steps[step]["loss"] == pytest.approx(whole.steps[step]["loss"], abs=1e-4)
    assert again.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)
    assert again.metrics["base_eval_loss"] == pytest.approx(result.metrics["base_eval_loss"], abs=1e-6)


def test_d15_diverged_preference_run_stops_with_step_and_reason(tiny_base: BaseModel, tmp_path: Path) -> None:
    config = config_of("dpo", tiny_base, tmp_path, learning_rate=0.9, preference={"beta": 5.0}, max_grad_norm=1e4)
    with pytest.raises(TrainingError, match=r"training stopped at step \d+: the loss rose to .* ten times the 0\.69"):
        run(config, tmp_path, Recorder())
    assert not (tmp_path / "adapter").exists()


def test_e5_answers_are_rendered_as_in_serving_and_end_with_the_turn(tiny_base: BaseModel, tmp_path: Path) -> None:
    inputs = read_inputs(config_of("dpo", tiny_base, tmp_path))
    row = cast(PreferenceRow, inputs.train_rows[0])
    decode = lambda ids: inputs.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert decode(row["chosen_ids"]).endswith("friend.<|im_end|>")
    assert decode(row["rejected_ids"]).startswith("Find it yourself")
