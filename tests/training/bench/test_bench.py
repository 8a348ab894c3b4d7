"""The comparison with TRL alone, and Ray's overhead: its figures, and one round on the tiny model."""

import json
from pathlib import Path

import pytest

from tests.training.ray_train.test_fit import tiny_run
from training.base_models.resolve import BaseCheckpoint
from training.bench.__main__ import TimedRun, compare, main


def timed(train_s: float, eval_loss: float) -> TimedRun:
    return TimedRun(train_s=train_s, num_examples=10, num_tokens=100, eval_loss=eval_loss, total_s=60)


def test_figures_are_of_the_same_round() -> None:
    figures = compare(
        {
            "trl": [timed(30, 2.0), timed(20, 1.8), timed(60, 2.2)],
            "loop": [timed(10, 2.1), timed(10, 1.8), timed(15, 2.0)],
            "ray": [timed(11, 2.1), timed(12, 1.8), timed(16.5, 2.0)],
        }
    )
    assert figures["speedup_vs_trl"] == 3
    assert figures["ray_overhead"] == pytest.approx(0.1)
    assert figures["eval_loss_vs_trl"] == pytest.approx((0.1 + 0 - 0.2) / 3, abs=1e-4)
    assert figures["eval_loss_vs_trl_stderr"] == pytest.approx(0.0882, abs=1e-4)
    assert figures["num_rounds"] == 3


@pytest.mark.slow
def test_last_line_is_json(tiny_base: BaseCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tiny_base, tmp_path).model_dump(mode="json", exclude_unset=True)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(config))
    assert (
        main(["--config", str(recipe), "--rounds", "1", "--ways", "trl,loop", "max_steps=3", "lora.lora_dropout=0"])
        == 0
    )
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert {"speedup_vs_trl", "eval_loss_vs_trl"} <= figures.keys()
    assert figures["num_examples"] == 12
    assert figures["speedup_vs_trl"] > 0
    assert abs(figures["eval_loss_vs_trl"]) < 1
    assert "TRL alone" in output
