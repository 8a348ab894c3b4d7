"""Where metrics go: TensorBoard files read back by TensorBoard, a Prometheus endpoint scraped during a real run."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import free_port, own_ray
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import TrainConfig
from training.errors import ConfigError
from training.ray_train import trackers
from training.ray_train.fit import fit
from training.ray_train.trackers import TensorBoard, TrackedRun, Trackers, check_trackers


def tracked(folder: Path, first_step: int = 1) -> TrackedRun:
    return TrackedRun("tiny-1", "tiny", "tiny-llama", {"lora": {"r": 4}}, first_step, folder / "tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the event files in a directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_run_has_every_step_once_in_tensorboard(tmp_path: Path) -> None:
    first = TensorBoard(tracked(tmp_path))
    for step in range(1, 6):
        first.log(step, {"loss": 10.0 + step})
    first.close()
    resumed = TensorBoard(tracked(tmp_path, first_step=4))  # the last checkpoint was of step 3
    for step in range(4, 8):
        resumed.log(step, {"loss": 20.0 + step, "eval_loss": 1.5})
    resumed.close()
    shown = scalars(tmp_path)
    assert shown["train/loss"] == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26), (7, 27)]
    assert [step for step, _ in shown["eval/eval_loss"]] == [4, 5, 6, 7]


@pytest.mark.promise("B11")
def test_a_tracker_that_is_not_installed_is_refused_saying_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(["tensorboard", "mlflow"])
    with pytest.raises(ConfigError, match=r"report_to names 'wandb'.*pip install wandb") as caught:
        check_trackers(["tensorboard", "wandb"])
    assert "\n" not in str(caught.value)


@pytest.mark.promise("B11")
def test_an_unknown_tracker_is_refused_by_the_configuration() -> None:
    with pytest.raises(ValueError, match="report_to"):
        TrainConfig.model_validate({"adapter": "a", "data": {"path": "x.jsonl"}, "report_to": ["comet"]})


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on() -> None:
    class Recorder:
        def __init__(self, dies_at: int) -> None:
            self.dies_at, self.steps = dies_at, list[int]()

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == self.dies_at:
                raise OSError("no route to host")
            self.steps.append(step)

        def close(self) -> None:
            self.steps.append(-1)

    sound, broken = Recorder(0), Recorder(2)
    both = Trackers()
    both.add("broken", lambda: broken)
    both.add("sound", lambda: sound)
    for step in (1, 2, 3):
        both.log(step, {"loss": 1.0})
    both.close()
    assert (sound.steps, broken.steps) == ([1, 2, 3, -1], [1])
    assert both.failed == {"broken": "OSError: no route to host"}


@pytest.fixture(scope="module")
def ray_with_metrics() -> Iterator[int]:
    """A Ray of this module's own that exports its metrics every half second; yields the port."""
    port = free_port()
    with own_ray(1, _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500}):
        yield port


@pytest.mark.slow
def test_a_run_is_seen_live_at_rays_prometheus_endpoint_and_afterwards_in_tensorboard(
    ray_with_metrics: int, tiny_base: BaseCheckpoint, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Where is post {n}?", "completion": f"By creek {n}."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "base_model": str(tiny_base.path), "adapter": "tiny", "data": {"path": str(data), "held_out": 0.2},
        "lora": {"r": 4}, "per_device_train_batch_size": 4, "max_steps": 30, "max_length": 128, "save_steps": 30,
        "eval_steps": 15, "sample_prompts": 1, "use_gpu": False, "resources_per_worker": {"CPU": 1},
        "storage_path": str(tmp_path / "runs"), "run_name": "scraped",
    }  # fmt: skip
    scraped = dict[str, float]()
    figures = ("step", "loss", "tokens_total", "tokens_per_second", "grad_norm", "learning_rate")
    seen = {f"ray_corral_train_{figure}" for figure in figures}
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.1):
            with contextlib.suppress(httpx.HTTPError):
                text = httpx.get(f"http://127.0.0.1:{ray_with_metrics}/metrics").text
                for line in text.splitlines():
                    if (found := re.match(r"(ray_corral_train_\w+)\{(.*)\} (\S+)$", line)) and 'run="scraped"' in line:
                        assert 'adapter="tiny"' in found[2]
                        assert 'base="tiny-llama"' in found[2]
                        scraped[found[1]] = float(found[3])

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        result = fit(TrainConfig.model_validate(settings))
        deadline = time.monotonic() + 300
        while not seen <= scraped.keys():
            assert time.monotonic() < deadline, scraped
            time.sleep(0.1)
    finally:
        ended.set()
        scraper.join()
    lines = [json.loads(line) for line in str(result.run_dir.read_text("metrics.jsonl")).splitlines()]
    by_step = {line["step"]: line for line in lines}
    assert 0 < scraped["ray_corral_train_step"] <= 30
    reached = by_step[int(scraped["ray_corral_train_step"])]
    assert min(by_step[s]["loss"] for s in by_step) <= scraped["ray_corral_train_loss"] <= by_step[1]["loss"] * 1.5
    assert 0 < scraped["ray_corral_train_tokens_total"] <= by_step[30]["num_tokens"]
    assert scraped["ray_corral_train_tokens_per_second"] > 0
    assert scraped["ray_corral_train_grad_norm"] > 0
    assert reached["learning_rate"] == pytest.approx(scraped["ray_corral_train_learning_rate"], abs=1e-5)

    shown = scalars(Path(result.run_dir.address))
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 31))
    assert [step for step, _ in shown["eval/eval_loss"]] == [15, 30]
    assert shown["result/base_eval_loss"][0][1] == pytest.approx(result.metrics["base_eval_loss"], rel=1e-5)
    assert result.run_dir.read_json("trackers.json") == {"failed": {}}
    for line in lines:
        assert line["peak_memory_bytes"] > 100 << 20
        assert line["samples_per_s"] > 0
        assert {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_s", "time"} <= line.keys()
