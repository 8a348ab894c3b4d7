"""From a name to local Llama weights: what is unusable is refused in one line; 4-bit weights are the same each time."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from training.base_models.nf4 import Quantization, load_quantized
from training.base_models.resolve import BaseCheckpoint, base_name, resolve_base_model
from training.base_models.tokenizer import load_tokenizer
from training.errors import BaseModelError


@pytest.fixture
def copy(tiny_base: BaseCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base.path, tmp_path / "My Llama"))


def test_the_embedded_model_is_pinned_and_offline(embedded_base: BaseCheckpoint) -> None:
    assert embedded_base.name == "smollm2-135m"
    assert embedded_base.context_length == 8192
    assert embedded_base.weights_sha256().startswith("fe45d49801a6ed8c")
    assert resolve_base_model("smollm2-135m") == embedded_base


def test_a_directory_is_named_after_itself(copy: Path) -> None:
    base = resolve_base_model(str(copy))
    assert (base.name, base.revision) == ("my-llama", None)
    assert base_name("meta-llama/Llama-2-13b-chat-hf") == "llama-2-13b-chat-hf"


_SHA = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.mark.promise("C4")
@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("smollm2-135m", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        (f"/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/{_SHA}", True),
        (f"models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/{_SHA}/", True),
        ("/home/somebody/SmolLM2-135M-Instruct/", True),
        ("/home/somebody/.corral/models/smollm2-135m-b179c9523d0e", True),
        ("HuggingFaceTB/SmolLM2-135M", False),
        ("/home/somebody/SmolLM2-135M", False),
        (f"/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/{_SHA}", False),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", False),
        ("", False),
    ],
)
def test_the_embedded_model_goes_by_the_names_of_its_weights(
    embedded_base: BaseCheckpoint, name: str, is_it: bool
) -> None:
    assert embedded_base.is_named(name) is is_it


@pytest.mark.promise("C4")
def test_a_snapshot_in_a_hub_cache_goes_by_the_name_of_its_model() -> None:
    snapshot = f"/cache/models--meta-llama--Llama-2-7b-hf/snapshots/{_SHA}"
    by_id = BaseCheckpoint("llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", Path(snapshot), _SHA)
    by_path = BaseCheckpoint(_SHA, snapshot, Path(snapshot), None)
    for base in (by_id, by_path):
        assert base.is_named("meta-llama/Llama-2-7b-hf")
        assert base.is_named("/data/models--meta-llama--Llama-2-7b-hf/snapshots/main")
        assert base.is_named("/data/Llama-2-7b-hf")
        assert not base.is_named("/data/models--meta-llama--Llama-2-13b-hf/snapshots/main")
        assert not base.is_named("/data/models--meta-llama--Llama-2-7b-hf/blobs")


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_that_lacks_a_file_is_refused(copy: Path, gone: str) -> None:
    (copy / gone).unlink()
    with pytest.raises(BaseModelError, match=gone.removeprefix("model")):
        resolve_base_model(str(copy))


def test_another_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    with pytest.raises(BaseModelError, match="is a MistralForCausalLM: Corral supports Llama models only"):
        resolve_base_model(str(copy))


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(BaseModelError, match="neither 'smollm2-135m', nor a local directory, nor a hub id"):
        resolve_base_model("smolm2")


def test_changed_weights_have_another_hash(copy: Path) -> None:
    base = resolve_base_model(str(copy))
    before = base.weights_sha256()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert base.weights_sha256() != before


def test_control_tokens_inside_a_text_are_text(tiny_base: BaseCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer.token_to_id("<|im_start|>") not in tokenizer.encode("a <|im_start|> b").ids


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_what_it_is_fast_in(
    tiny_base: BaseCheckpoint, has_bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    assert load_quantized(tiny_base, Quantization()).dtype == expected
    assert load_quantized(tiny_base, Quantization(compute_dtype="float32")).dtype == torch.float32


def test_two_loads_give_the_same_4_bit_weights(tiny_base: BaseCheckpoint) -> None:
    first, second = (load_quantized(tiny_base, Quantization()).model.layers[1].mlp.up_proj for _ in range(2))
    assert first.weight.data.equal(second.weight.data)
    assert first.weight.data.numel() * 2 == 64 * 128  # two values a byte
    assert first.weight.quant_state.absmax.equal(second.weight.quant_state.absmax)


_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = """
import sys
from training.base_models.resolve import resolve_base_model
from training.errors import BaseModelError
try:
    base = resolve_base_model(sys.argv[1], *sys.argv[2:])
    print("usable:", base.name, base.revision, base.context_length)
except BaseModelError as error:
    print("refused:", error)
"""


@dataclass
class Hub:
    """The part of the hub's HTTP API that a download takes, over the files of one directory on loopback.

    Attributes:
        refusals: per repository the status and the error code that the hub names in `X-Error-Code`.
        requested_paths: every path that was requested.
    """

    folder: Path
    cache: Path
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    requested_paths: list[str] = field(default_factory=list)
    url: str = ""

    def resolve(self, *arguments: str, run_by: Sequence[str] = ()) -> str:
        """The result of `resolve_base_model` in a process of its own, which knows no other hub."""
        environment = os.environ | {"HF_ENDPOINT": self.url, "HF_HOME": str(self.cache), "HF_TOKEN": ""}
        command = [*run_by, sys.executable, "-c", _RESOLVE, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


@pytest.fixture
def hub(tiny_base: BaseCheckpoint, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(Path(shutil.copytree(tiny_base.path, tmp_path / "repository")), tmp_path / "cache")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requested_paths.append(self.path)
            repository = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
            file = hub.folder / self.path.split("/")[-1]
            if repository in hub.refusals:
                status, code = hub.refusals[repository]
                self._answer(status, b"", {"X-Error-Code": code})
            elif self.path.startswith("/api/models"):
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _COMMIT}
                    for file in sorted(hub.folder.iterdir())
                ]
                about = {"id": repository, "sha": _COMMIT, "siblings": []}
                listing = files if "/tree/" in self.path else about
                self._answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
            elif file.is_file():
                content = file.read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT})
            else:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keeps the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        hub.url = f"http://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield hub
        listener.shutdown()


def test_a_hub_model_is_fetched_once_and_works_offline_from_then_on(hub: Hub) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"weights in another format")
    usable = f"usable: llama-2-7b {_COMMIT} 512"
    assert hub.resolve("meta-llama/Llama-2-7B") == usable
    assert not any("pytorch_model.bin" in path for path in hub.requested_paths if "/resolve/" in path)
    hub.url = "http://127.0.0.1:9"  # the discard port: nothing answers
    assert hub.resolve("meta-llama/Llama-2-7B") == usable
    error = hub.resolve("meta-llama/Llama-2-13B", run_by=["env", "HF_HUB_OFFLINE=1"])  # else retried for 20 seconds
    assert "'meta-llama/Llama-2-13B' is not in the local cache and the hub cannot be reached" in error


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its licence on its hub page, then set HF_TOKEN or run 'hf auth login'"),
        (404, "RepoNotFound", "is not on the hub, or is private: check the spelling, or set HF_TOKEN"),
        (404, "RevisionNotFound", "has no revision 'v9': check base_revision"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, status: int, code: str, message: str) -> None:
    hub.refusals["acme/llama"] = status, code
    answer = hub.resolve("acme/llama", "v9")
    assert answer.startswith("refused: base model 'acme/llama'")
    assert message in answer
    assert "\n" not in answer


def test_another_architecture_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    assert "'acme/mistral' is a MistralForCausalLM: Corral supports Llama models only" in hub.resolve("acme/mistral")
    assert not any("safetensors" in path for path in hub.requested_paths)


def test_a_full_disk_is_one_line(hub: Hub) -> None:
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace, which the full disk is mounted in")
    hub.cache.mkdir()
    answer = hub.resolve(
        "acme/llama",
        run_by=[*own_mounts, "sh", "-c", f'mount -t tmpfs -o size=256k none "{hub.cache}" && exec "$@"', "sh"],
    )
    assert answer.startswith("refused: no space left while preparing base model 'acme/llama'")
    assert "free some space" in answer
    assert "\n" not in answer
