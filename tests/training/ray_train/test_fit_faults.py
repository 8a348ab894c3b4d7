"""What a run survives: an object store for its directory, a node that leaves, a disk that fills up. Real Ray."""

import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest
import yaml

from tests.conftest import own_ray
from tests.training.ray_train.test_fit import assert_same_run, tiny_run, when_step
from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import TrainConfig
from training.ray_train.fit import fit
from training.runs.run_dir import RunDir


@pytest.fixture
def config(tiny_base: BaseCheckpoint, tmp_path: Path) -> TrainConfig:
    return tiny_run(tiny_base, tmp_path)


def kill(workers: list[psutil.Process]) -> None:
    for worker in workers:
        worker.kill()


@pytest.mark.slow
@pytest.mark.promise("D13")
def test_a_run_in_an_object_store_goes_on_there_and_keeps_two_checkpoints(config: TrainConfig, s3: str) -> None:
    with own_ray():
        whole = fit(config.model_copy(update={"run_name": "whole"}))
        run_dir = RunDir(s3, "stored")
        killed = when_step(run_dir, 5, kill)
        stored = fit(config.model_copy(update={"run_name": "stored", "storage_path": s3, "max_failures": 1}))
    assert killed.is_set()
    assert_same_run(stored, whole)
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    files = [path.split("/stored/")[1] for path in store.find(str(run_dir))]
    assert {"config.json", "metrics.jsonl", "result.json", "adapter/adapter_model.safetensors"} <= set(files)
    assert len([file for file in files if file.endswith("/optimizer.pt")]) == 2
    assert not [file for file in files if file.startswith("scratch")]


@pytest.mark.slow
@pytest.mark.promise("D13")
@pytest.mark.parametrize(("num_workers", "fsdp"), [([1, 2], False), ([2, 3], True)])
def test_elastic_run_goes_on_with_fewer_workers_when_a_node_leaves(
    config: TrainConfig, num_workers: list[int], fsdp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps have the same rows on any number of workers: the run ends where the uninterrupted one does."""
    import ray
    from ray.cluster_utils import Cluster

    whole = TrainConfig.model_validate(
        config.model_dump() | {"per_device_train_batch_size": 2, "train_batch_size": 4, "run_name": "whole"}
        | {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}}  # dropout differs with the number of workers
        | {"quantization": {"compute_dtype": "float32"}}  # bfloat16 shows in which order gradients were added
    )  # fmt: skip
    changes = {"num_workers": num_workers, "fsdp": fsdp, "max_failures": 2, "run_name": "elastic"}
    fewest, most = num_workers
    # Ray takes a silent node for dead after 2 s; Ray Train waits 25 s for workers, which a busy machine needs
    silence = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "25")
    head = {"num_cpus": fewest, "include_dashboard": False, "_system_config": silence}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    leaving = cluster.add_node(num_cpus=most - fewest)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        run_dir = RunDir(str(config.storage_path), "elastic")
        left = when_step(run_dir, 6, lambda _: cluster.remove_node(leaving, allow_graceful=False))
        elastic = fit(whole.model_copy(update=changes))
        assert left.is_set()
        uninterrupted = fit(whole)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(elastic.environment.devices) == fewest
    assert_same_run(elastic, uninterrupted)


_FILL_AND_RESUME = """
mount -t tmpfs -o size=700k none "$1" || exit 90
"$2" -m training --config "$3" storage_path="$1" && exit 91
echo ---
mount -o remount,size=100m "$1" || exit 92
"$2" -m training --config "$3" storage_path="$1"
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(config: TrainConfig, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    recipe = tmp_path / "recipe.yaml"
    named = {"adapter": "full-disk", "run_name": "full"}  # no other test registers an adapter of this name
    told = config.model_dump(mode="json") | named | {"report_to": [], "save_steps": 2}
    recipe.write_text(yaml.safe_dump(told))
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", _FILL_AND_RESUME, "sh"]
    done = subprocess.run(
        [*command, str(disk), sys.executable, str(recipe)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left" in errors[0] or "no space is left" in errors[0]
    assert "run_name=full" in errors[0] or "free some" in errors[0]
    assert "tiny-llama:full-disk@1 is registered" in done.stdout.split("---")[1]
