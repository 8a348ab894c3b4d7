"""Fixtures that several test modules share.

Every process of a session has its own empty CORRAL_HOME and Ray directory, under short paths (Ray's sockets need that);
what is made of the embedded model is shared. The quickstart is trained once, by the command a user types, while other
tests run, and served once, likewise.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import httpx
import hypothesis
import psutil
import pytest
import yaml

from training.base_models.embedded import EMBEDDED_MODEL
from training.base_models.resolve import BaseCheckpoint, resolve_base_model
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher, import_adapter
from training.registry.registry import AdapterRegistry

pytest_plugins = ("tests.tiers", "tests.workers")

# Beside other load an example may take any time.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

_BEGINS_SESSION = "CORRAL_TEST_SCRATCH" not in os.environ  # neither a worker nor another process that a test started
if _BEGINS_SESSION:
    os.environ["CORRAL_TEST_SCRATCH"] = tempfile.mkdtemp(prefix="corral-", dir="/tmp")
_SCRATCH = Path(os.environ["CORRAL_TEST_SCRATCH"])
QUICKSTART_HOME = _SCRATCH / "home"
_OWN = _SCRATCH / os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ["CORRAL_HOME"] = str(_OWN / "home")
os.environ["RAY_TMPDIR"] = str(_OWN / "ray")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"  # how often Ray Train looks whether a run has ended
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # an actor in each run, for nodes that a cloud takes back
os.environ.pop("RAY_ADDRESS", None)
for _home in (QUICKSTART_HOME, _OWN / "home"):
    _home.mkdir(mode=0o700, parents=True, exist_ok=True)
for _name in ("models", "kernels"):  # made under a lock, and the same for all
    (QUICKSTART_HOME / _name).mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (_OWN / "home" / _name).symlink_to(QUICKSTART_HOME / _name)

_TRAIN = '"$@"; echo $? > "$0/training.status"'  # a shell in the folder $0: run a command, record its exit status

_training: subprocess.Popen[bytes] | None = None


def pytest_collection_finish(session: pytest.Session) -> None:
    needed = any("quickstart" in getattr(item, "fixturenames", ()) for item in session.items)
    if _BEGINS_SESSION and needed and not session.config.option.collectonly:
        _train_quickstart()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished() -> None:
    from tests.workers import collected_groups

    if "quickstart" in collected_groups().values():
        _train_quickstart()


def pytest_unconfigure() -> None:
    if not _BEGINS_SESSION:
        return
    if _training is not None and _training.poll() is None:
        os.killpg(_training.pid, signal.SIGTERM)
        _training.wait(timeout=300)
    shutil.rmtree(_SCRATCH, ignore_errors=True)


def _train_quickstart() -> None:
    """Begin it, unless it has begun; how it ended will be in `training.status`."""
    global _training
    if _training is None:
        # on one core: two threads that wait for each other at every step suffer most from busy neighbours
        recipe = ["--config", "configs/train/quickstart.yaml", "resources_per_worker.CPU=1"]
        train = [sys.executable, "-m", "training", *recipe]
        command = ["sh", "-c", _TRAIN, str(_SCRATCH), *train]
        with (_SCRATCH / "training.log").open("wb") as log:
            _training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on. It is none of those that the kernel gives to whoever
    asks for any: nothing else takes it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_up(url: str, headers: dict[str, str] | None = None) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, headers=headers, timeout=120).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address in a bucket of an S3 server on loopback, for this process and those that it starts."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"corral-runs-{port}"  # moto keeps buckets when a server of this process stops
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/here"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


@contextlib.contextmanager
def own_ray(num_cpus: int = 2, **options: Any) -> Iterator[None]:
    """A Ray of this process, which knows its environment, for the block."""
    import ray

    from training.local_ray.start import init_ray

    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        init_ray(num_cpus=num_cpus, num_gpus=0, log_to_driver=False, _temp_dir=temp_dir, **options)
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def ray_head(env: dict[str, str], num_cpus: int = 4) -> Iterator[str]:
    """A cluster of one node with ports and a directory of its own; yields its dashboard's address.

    `env` has its token as RAY_AUTH_TOKEN; logical CPUs, so tests choose how many.
    """
    port = free_port()
    own_ports = ("port", "ray-client-server-port", "dashboard-agent-listen-port")  # other tests' Ray has the usual ones
    options: dict[str, int | str] = {name: free_port() for name in own_ports}
    options |= {"dashboard-port": port, "num-cpus": num_cpus, "node-ip-address": "127.0.0.1"}
    ray = Path(sys.executable).with_name("ray")
    env = env | {"PATH": f"{ray.parent}:{env['PATH']}"}  # a job runs the head's python
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        options["temp-dir"] = scratch  # Ray's sockets need a short path
        command = [str(ray), "start", "--head", "--block", *(f"--{key}={options[key]}" for key in options)]
        with Path(scratch, "ray.log").open("wb") as log:
            head = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_up(f"{address}/api/version", 300, {"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"})
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # on SIGTERM it would drain the node for half a minute
            head.wait(timeout=300)


def wait_until_up(url: str, seconds: float, headers: dict[str, str] | None = None) -> None:
    """Wait until a GET is answered with 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_up(url, headers):
            return
        time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")


def wait_until(
    holds: Callable[[], bool], process: "subprocess.Popen[str] | None" = None, *, seconds: float = 300
) -> None:
    """Wait for a condition; fails at once if the process that is to bring it about has ended."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            raise AssertionError(
                f"it ended with {process.returncode}: {process.stderr.read() if process.stderr else ''}"
            )
        time.sleep(0.05)


@contextlib.contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    """The processes hold still for the block: a run cannot end while a test looks at it."""
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def descendants(pid: int, name: str) -> list[psutil.Process]:
    """Descendants of a process with this name in their command line; those that end meanwhile are left out."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers of this process's runs, without those of the quickstart, which trains beside the tests."""
    own = psutil.Process().children()
    if _training is not None:
        own = [process for process in own if process.pid != _training.pid]
    return [worker for process in own for worker in descendants(process.pid, "RayTrainWorker")]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """`corral serve` in a process of its own."""

    url: str
    ui_url: str
    base_model: str
    adapter: str
    log: Path
    pid: int


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the tiny model more torch threads only wait for each other."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def embedded_base() -> BaseCheckpoint:
    """The embedded model, converted into this session's CORRAL_HOME."""
    return resolve_base_model(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def quickstart(embedded_base: BaseCheckpoint) -> AdapterManifest:
    """The quickstart recipe, trained and registered by `python -m training`."""
    status, deadline = _SCRATCH / "training.status", time.monotonic() + 1800
    while not (status.exists() and status.read_text()):
        assert time.monotonic() < deadline, "the quickstart is not trained"
        time.sleep(0.2)
    assert status.read_text() == "0\n", (_SCRATCH / "training.log").read_text()[-4000:]
    if _OWN != _SCRATCH:
        shutil.copytree(QUICKSTART_HOME / "registry", _OWN / "home" / "registry", dirs_exist_ok=True)
    return AdapterRegistry().resolve("ranch-hand")


def serve_config(**changes: Any) -> dict[str, Any]:
    """The quickstart's serve YAML on a free port; `changes` go to the options of LlamaModel."""
    content: dict[str, Any] = yaml.safe_load(Path("configs/serve/quickstart.yaml").read_text())
    content["http_options"]["port"] = free_port()
    content["applications"][0]["deployments"][0].update(changes)
    return content


def start_server(
    content: dict[str, Any], folder: Path, python: str = sys.executable
) -> tuple[subprocess.Popen[bytes], RunningServer]:
    """Run `corral serve` on a YAML and wait until it is ready."""
    config, log = folder / "serve.yaml", folder / "serve.log"
    config.write_text(yaml.safe_dump(content))
    command = [python, "-m", "clients.cli", "serve", str(config)]
    prefix = content["applications"][0]["route_prefix"].rstrip("/")
    url = f"http://127.0.0.1:{content['http_options']['port']}"
    ui_url = url + content["applications"][1]["route_prefix"] + "/"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if is_up(f"{url}{prefix}/readyz") and is_up(ui_url):
            server = RunningServer(
                url + prefix, ui_url, EMBEDDED_MODEL, f"{EMBEDDED_MODEL}:ranch-hand", log, process.pid
            )
            return process, server
        time.sleep(0.3)
    process.kill()
    raise AssertionError(f"corral serve did not start: {log.read_text()[-4000:]}")


def stop_server(process: subprocess.Popen[bytes]) -> int:
    """End it as a service manager would; returns its exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=300)


@pytest.fixture(scope="session")
def server(quickstart: AdapterManifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The quickstart's server with the trained adapter in its registry."""
    process, running = start_server(serve_config(), tmp_path_factory.mktemp("server"))
    yield running
    assert stop_server(process) == 0, running.log.read_text()[-4000:]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseCheckpoint:
    """A random Llama of 2 layers with the embedded model's tokenizer: for logic, not for answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path: Path = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that two prompts get different answers
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    embedded = resolve_base_model(EMBEDDED_MODEL).path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, path / name)
    return resolve_base_model(str(path))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT's `save_pretrained` writes for LoRA r 4 on all linear layers of `tiny_base`, B not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("adapters") / "tiny"
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(path)
    return path


def register_three(registry: AdapterRegistry, base: BaseCheckpoint, adapter: Path) -> None:
    """Three versions of `ranch`, the second of them the champion, after the first."""
    metrics = {"eval_loss": 1.0, "base_eval_loss": 2.0}
    for _ in range(3):
        AdapterPublisher(registry).register(
            adapter, AdapterDraft(name="ranch", base=base, chat_format="chatml", metrics=metrics)
        )
    AdapterPromoter(registry).promote("ranch", 1)
    AdapterPromoter(registry).promote("ranch", 2)


@dataclass(frozen=True, slots=True)
class InProcessApi:
    """`tests.deployments.in_process.serving` on the tiny model. `model` is the object behind the replica."""

    url: str
    base: BaseCheckpoint
    adapter: str
    model: Any
    args: Any


@pytest.fixture(scope="session")
def tiny_api(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessApi]:
    """The API over the tiny model with an adapter and 512 tokens of context, on HTTP in this process."""
    import torch

    from deployments.config import EngineArgs, ServeArgs
    from deployments.replica.model import LlamaModel
    from tests.deployments.in_process import behind, serving

    root = tmp_path_factory.mktemp("tiny-api") / "registry"
    import_adapter(AdapterRegistry(root), tiny_adapter, "tuned", tiny_base, chat_format="chatml", force=True)
    engine = EngineArgs(max_model_len=512, kv_cache_gib=0.02, num_threads=1, chunks_per_s=10_000)
    args = ServeArgs(base_model=str(tiny_base.path), registry=str(root), engine=engine)
    num_threads = torch.get_num_threads()
    model = behind(LlamaModel, args)
    with serving(args, model) as url:
        yield InProcessApi(url, tiny_base, f"{tiny_base.name}:tuned", model, args)
    torch.set_num_threads(num_threads)
