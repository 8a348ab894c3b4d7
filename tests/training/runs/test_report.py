"""The report of a run, from the files in its directory: of a finished run, and of one that failed early."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.runs.report import build_report, write_report
from training.runs.report_plots import smoothed
from training.runs.run_dir import RunDir

MEMORY = {
    "phase": "backward", "base_4bit": 2 << 30, "base_other": 1 << 29, "adapter": 1 << 28, "optimizer": 0,
    "gradients": 0, "activations": 3 << 30, "workspace": 1 << 28, "paged": 1 << 29, "context": 600 << 20,
    "allocated": 6 << 30, "total": 7 << 30, "on_gpu": True,
}  # fmt: skip
SAMPLE = {"prompt": "Who cooks | breakfast?", "reference": "Ada.", "base": "I\ncannot", "adapter": "<b>Ada</b>"}


def records(num_steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "num_steps": 40, "time": 1000.0 + step, "loss": 4.0 - step / 20, "learning_rate": 1e-3 / step,
            "tokens_per_s": 500.0, "samples_per_s": 8.0, "num_tokens": 25_000.0 * step,
            "peak_memory_bytes": 5.5 * 2**30,
            **({"eval_loss": 3.5 - step / 40} if step % 10 == 0 else {}),
        }
        for step in range(1, num_steps + 1)
    ]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A finished run of 40 steps that took an hour at 2.50."""
    run = RunDir(tmp_path, "ranch-hand-1")
    data = {"path": [{"path": "rows.jsonl"}]}
    run.write_json("config.json", {"adapter": "ranch-hand", "base_model": "llama-7b",
                                   "lora": {"r": 16, "lora_alpha": 7}, "data": data,
                                   "price_per_hour": 2.5})  # fmt: skip
    run.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records(40)) + '{"step": 41, "lo')
    metrics = {"eval_loss": 2.5, "base_eval_loss": 5.0, "train_s": 40.0, "num_steps": 40.0}
    run.write_json("result.json", {"metrics": metrics, "samples": [SAMPLE]})
    run.write_json("plan.json", {"memory": MEMORY})
    lock_record = {"pid": 1, "host": "gone", "started": 1000.0, "seen": 4600.0, "ended": 4600.0}
    run.write_json("drivers/0001.json", lock_record)
    run.write_json("phases.json", [{"phase": "loading", "time": 1000.0}, {"phase": "training", "time": 1060.0}])
    run.write_json("registered.json", {"model_id": "llama-7b:ranch-hand@3", "forced": False})
    devices = ["NVIDIA H100"] * 2
    run.write_json("environment.json", {"code_version": "0.1.0", "git_commit": "abc", "libraries": {"torch": "2.13.0"},
                                        "devices": devices})  # fmt: skip
    return run


def test_report_says_what_a_person_asks_first(run_dir: RunDir) -> None:
    report = build_report(run_dir)
    assert "# ranch-hand on llama-7b" in report
    assert "**Held-out loss: base 5.000, adapter 2.500** (50% of the base's)" in report
    assert "Registered as `llama-7b:ranch-hand@3`. Try it: `corral chat --model llama-7b:ranch-hand`" in report
    assert "| held out | 40 | 2.5000 |" in report
    assert "| last step | 40 | 2.0000 |" in report
    assert "| NVIDIA H100 | 2 x |" in report
    assert "| torch | 2.13.0 |" in report


def test_report_puts_the_estimate_beside_what_was_measured(run_dir: RunDir) -> None:
    report = build_report(run_dir)
    assert "| measured on worker 0 | 5.50 GiB |" in report
    assert "| estimated | 6.00 GiB |" in report  # as torch counts: without the CUDA context
    assert "activations (backward)       3.00 GiB" in report


def test_cost_is_hours_times_price_and_per_million_trained_tokens(run_dir: RunDir) -> None:
    report = build_report(run_dir)
    assert "| cost at 2.5 per hour | 2.5 |" in report
    assert "| cost per million tokens | 2.5 |" in report  # 40 steps of 25,000 tokens
    assert "| time of: loading | 0:01:00 |" in report
    assert "| time of: training | 0:59:00 |" in report


def test_only_what_differs_from_the_defaults_is_listed(run_dir: RunDir) -> None:
    report = build_report(run_dir)
    assert "| `lora.lora_alpha` | 7 |" in report
    assert "`lora.r`" not in report


@pytest.mark.promise("C7")
def test_answers_cannot_break_the_table_nor_be_html(run_dir: RunDir) -> None:
    assert r"| Who cooks \| breakfast? | Ada. | I cannot | &lt;b>Ada&lt;/b> |" in build_report(run_dir)


def test_failed_run_says_where_and_why_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "wild")
    run.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records(7)))
    run.write_json("failure.json", {"error": "TrainingError", "message": "the loss became nan: lower learning_rate"})
    write_report(run)
    report = str(run.read_text("report.md"))
    assert "**Failed** after step 7 of 40: the loss became nan: lower learning_rate" in report
    assert "Held-out loss" not in report
    assert (tmp_path / "wild" / "report.png").stat().st_size > 10_000
    assert build_report(RunDir(tmp_path, "nothing")).startswith("# nothing on its base")


def test_refused_adapter_is_named_with_the_reason(run_dir: RunDir) -> None:
    run_dir.write_json("registered.json", {"refused": "eval_loss 5.1 is not below 5.0"})
    assert "**Not registered**: eval_loss 5.1 is not below 5.0" in build_report(run_dir)


def test_pictures_show_what_was_logged(run_dir: RunDir, tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_report(run_dir)
    loss, report = imread(tmp_path / run_dir.name / "loss.png"), imread(tmp_path / run_dir.name / "report.png")
    assert report.shape[0] > loss.shape[0] > 300
    for rgb in ((0xC8, 0x51, 0x1B), (0x7A, 0x7A, 0x7A), (0x1F, 0x4E, 0x79)):  # held out, base, training
        matches = abs(loss[..., :3] * 255 - rgb).max(axis=-1) < 8
        assert matches.sum() > 50


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    assert smoothed([4.0], 0.9)[0] == pytest.approx(4.0)
    assert smoothed([4.0] * 30, 0.9) == pytest.approx([4.0] * 30)
    assert 1.0 < smoothed([4.0] + [1.0] * 30, 0.9)[-1] < 1.2
