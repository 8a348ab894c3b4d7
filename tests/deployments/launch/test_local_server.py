"""A complete serve YAML: replicas scale with the load, and a port in use is reported in one line (D16)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import descendants, serve_config

# Runs in a process that owns a Ray cluster. Prints the number of model replicas before, during and after a load.
_LOAD = """
import json, sys, threading, time
import httpx, yaml
from ray import serve
from deployments.launch.local_server import serving

def replicas():
    states = serve.status().applications["corral"].deployments["LlamaModel"].replica_states
    return states.get("RUNNING", 0)

def wait_for(number, seconds):
    deadline = time.monotonic() + seconds
    while replicas() != number and time.monotonic() < deadline:
        time.sleep(0.5)
    return replicas()

def stream(url):
    while not enough.is_set():
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 64, "ignore_eos": True}
        statuses.append(httpx.post(url + "/v1/chat/completions", json=body, timeout=120).status_code)

enough, statuses = threading.Event(), []
with serving(yaml.safe_load(open(sys.argv[1]))) as server:
    before = replicas()
    threads = [threading.Thread(target=stream, args=(server.url,)) for _ in range(8)]
    [thread.start() for thread in threads]
    during = wait_for(2, 300)
    enough.set()
    [thread.join() for thread in threads]
    after = wait_for(1, 300)
print(json.dumps({"replicas": [before, during, after], "statuses": sorted(set(statuses)), "answers": len(statuses)}))
"""


@pytest.mark.slow
def test_a_second_replica_comes_with_load_and_goes_without(tmp_path: Path, embedded_base: object) -> None:
    content = serve_config(
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "metrics_interval_s": 1,
            "look_back_period_s": 2,
            "upscale_delay_s": 1,
            "downscale_delay_s": 3,
        }
    )
    del content["applications"][1]  # no page needed
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(content))
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(config)], capture_output=True, text=True, timeout=850, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["replicas"] == [1, 2, 1]
    assert report["statuses"] == [200]
    assert report["answers"] >= 8


def corral_serve(content: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """`corral serve` on a YAML that it refuses."""
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "clients.cli", "serve", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.promise("D16")
def test_a_taken_port_is_named_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        content = serve_config()
        content["http_options"]["port"] = port = listener.getsockname()[1]
        result = corral_serve(content, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert str(port) in result.stderr
    assert f"(pid {os.getpid()})" in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("change", [{"num_replica": 1}, {"max_ongoing_request": 1}])
def test_corral_serve_refuses_a_misspelt_key_before_anything_starts(tmp_path: Path, change: dict[str, int]) -> None:
    result = corral_serve(serve_config(**change), tmp_path)
    assert result.returncode == 2
    assert next(iter(change)) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.promise("D5")
def test_sigterm_while_it_starts_ends_it_and_all_of_ray(tmp_path: Path, embedded_base: object) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_config()))
    command = [sys.executable, "-m", "clients.cli", "serve", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 300
        while not (replicas := descendants(process.pid, "ServeReplica")) and time.monotonic() < deadline:
            time.sleep(0.2)
        everything = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
    assert replicas
    assert process.returncode == 0, output
    assert "stopped" in output
    assert "SIGTERM received" not in output
    _, alive = psutil.wait_procs(everything, timeout=300)
    assert not alive


@pytest.mark.slow
def test_corral_bench_starts_the_server_that_it_measures(tmp_path: Path, embedded_base: object) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_config()))
    options = ["--serve", str(config), "--concurrency", "2", "--num-requests", "4", "--max-tokens", "8", "--json", "-"]
    result = subprocess.run(
        [sys.executable, "-m", "clients.cli", "bench", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    level = json.loads(result.stdout)["levels"][0]
    assert (level["requests"], level["errors"], level["output_tokens"]) == (4, 0, 32)
