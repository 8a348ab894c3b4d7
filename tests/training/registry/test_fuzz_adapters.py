"""Arbitrary adapter folders (C4, C5): refused in one line, or what is registered is complete and fits the base."""

import json
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterRefused, RegistryError
from training.registry.adapter_files import lora_shapes
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.publish import import_adapter
from training.registry.registry import AdapterRegistry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Register = Callable[[bytes, bytes], bool]

keys = st.sampled_from(
    ["r", "lora_alpha", "target_modules", "peft_type", "auto_map", "__metadata__", "dtype", "shape", "data_offsets", ""]
)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, -1, 1 << 31, 1 << 48, 1 << 63, 10**400]))
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["F32", "BF16", "I64", "q_proj", "../x", "\ud800", "all-linear", ".*", "x" * 5000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def register(tiny_base: BaseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Register:
    """Registers an adapter of these two files; False where it is refused as it should be."""
    import torch
    from safetensors.torch import load_file

    scratch = tmp_path_factory.mktemp("fuzz")
    registry = AdapterRegistry(scratch / "registry")
    folder = scratch / "adapter"
    folder.mkdir()

    def import_it(config: bytes, weights: bytes) -> bool:
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        try:
            manifest = import_adapter(registry, folder, "fuzz", tiny_base, chat_format="chatml", force=True)
        except (AdapterRefused, RegistryError) as refused:
            message = str(refused)
        else:
            check_whole(manifest)
            AdapterPromoter(registry).delete("fuzz", manifest.version)
            return True
        assert "\n" not in message
        assert len(message) < 800
        return False

    def check_whole(manifest: AdapterManifest) -> None:
        published = registry.fetch(manifest)
        tensors = load_file(published / WEIGHTS)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == lora_shapes(tiny_base, manifest.lora)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        assert json.loads((published / CONFIG).read_text()).keys().isdisjoint({"auto_map", "modules_to_save"})

    return import_it


@pytest.fixture(scope="module")
def files(tiny_adapter: Path) -> tuple[bytes, bytes]:
    return (tiny_adapter / CONFIG).read_bytes(), (tiny_adapter / WEIGHTS).read_bytes()


def test_the_files_as_they_are_pass(register: Register, files: tuple[bytes, bytes]) -> None:
    assert register(*files)


def fuzzed(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.promise("C4")
@given(changes=st.dictionaries(keys, values, min_size=1, max_size=3), lost=st.lists(keys, max_size=1))
@fuzzed(150)
def test_any_config_is_refused_or_harmless(
    register: Register, files: tuple[bytes, bytes], changes: dict[str, Any], lost: list[str]
) -> None:
    config = {key: value for key, value in json.loads(files[0]).items() if key not in lost} | changes
    register(json.dumps(config).encode(), files[1])


@pytest.mark.promise("C5")
@given(data=st.data())
@fuzzed(150)
def test_any_header_is_refused_or_harmless(register: Register, files: tuple[bytes, bytes], data: st.DataObject) -> None:
    config, weights = files
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        match data.draw(st.sampled_from(["replace", "field", "rename", "swap"])):
            case "replace":
                header[name] = data.draw(values)
            case "field" if isinstance(header[name], dict):
                header[name] |= {data.draw(keys): data.draw(values)}
            case "swap":
                other = data.draw(st.sampled_from(sorted(header)))
                header[name], header[other] = header[other], header[name]
            case _:
                header[data.draw(st.text(max_size=20))] = header.pop(name)
    text = json.dumps(header).encode()
    register(config, struct.pack("<Q", len(text)) + text + weights[8 + length :])


@pytest.mark.promise("C5")
@given(start=st.floats(0, 1), end=st.floats(0, 1), to=st.floats(0, 1), noise=st.binary(max_size=64))
@fuzzed(150)
def test_any_splice_of_the_weights_is_refused_or_harmless(
    register: Register, files: tuple[bytes, bytes], start: float, end: float, to: float, noise: bytes
) -> None:
    """A slice of the file, and noise, written over another part of it."""
    config, weights = files
    first, last = sorted((int(start * len(weights)), int(end * len(weights))))
    piece = weights[first:last] + noise
    place = int(to * len(weights))
    register(config, weights[:place] + piece + weights[place + len(piece) :])


@pytest.mark.promise("C5")
def test_the_largest_header_costs_bounded_memory_and_time(register: Register, files: tuple[bytes, bytes]) -> None:
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    text = json.dumps(entries).encode()
    assert 9_000_000 < len(text) < 10_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert not register(files[0], struct.pack("<Q", len(text)) + text)
    seconds = time.process_time() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\na 10 MB header is refused in {seconds:.1f} s with {megabytes:.0f} MB more")
    assert seconds < 30  # it takes one or two
    assert megabytes < 400


@pytest.mark.promise("C4")
def test_code_beside_an_adapter_is_not_run_and_not_published(
    tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    folder, canary = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter")), tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w').close()\n"
    for name in ("modeling_llama.py", "__init__.py", "adapter_config.py", "setup.py"):
        (folder / name).write_text(touch)
    pickled = b"cbuiltins\nexec\n(V" + touch.strip().encode() + b"\ntR."  # what pickle.loads would execute
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pkl"):
        (folder / name).write_bytes(pickled)
    registry = AdapterRegistry(tmp_path / "registry")
    manifest = import_adapter(registry, folder, "beside", tiny_base, chat_format="chatml", force=True)
    published = sorted(path.name for path in registry.fetch(manifest).iterdir())
    assert published == [CONFIG, WEIGHTS, "manifest.json"]
    (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), "auto_map": {"AutoModel": "modeling_llama.Model"}})
    )
    with pytest.raises(AdapterRefused, match="auto_map"):
        import_adapter(registry, folder, "beside", tiny_base, chat_format="chatml", force=True)
    assert not canary.exists()
