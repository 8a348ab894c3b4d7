"""Reading a registry on disks and in object stores: versions, tampered files, read-only folders (D12, D17, E4)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.registry.registries import GOOD, draft, run_script
from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, AdapterRefused, RegistryError
from training.registry.manifest import AdapterManifest, DatasetRef, check_base
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

pytestmark = pytest.mark.usefixtures("own_home")


def test_register_resolve_fetch(registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> None:
    full = AdapterDraft(
        name="ranch",
        base=tiny_base,
        chat_format="chatml",
        quantization=Quantization(compute_dtype="float32"),
        metrics=GOOD,
        dataset=DatasetRef(sources=["a.jsonl"], sha256="0" * 64, num_rows=9, num_held_out=1),
        config={"lr": 1e-3, "lora": {"r": 4}},
        run_name="run-1",
    )
    manifest = AdapterPublisher(registry).register(tiny_adapter, full)
    assert manifest.model_id == "tiny-llama:ranch@1"
    assert manifest.base.weights_sha256 == tiny_base.weights_sha256()
    assert (manifest.lora.r, manifest.lora.lora_alpha, len(manifest.lora.target_modules)) == (4, 8, 7)
    assert (manifest.dataset, manifest.config, manifest.quantization) == (full.dataset, full.config, full.quantization)
    assert (manifest.forced, manifest.created.tzname()) == (False, "UTC")

    second = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    assert second.version == 2
    assert registry.names() == ["ranch"]
    assert registry.versions("ranch") == [1, 2]
    assert registry.list() == [manifest, second]
    assert registry.resolve("ranch") == second
    assert registry.resolve("ranch", "1") == registry.manifest("ranch", 1) == manifest

    folder = registry.fetch(manifest)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tiny_adapter / weights).read_bytes()


@pytest.mark.promise("E4")
def test_registered_folder_loads_with_peft_and_answers_the_same(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import LlamaForCausalLM

    folder = registry.fetch(AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base)))
    prompt = torch.tensor([[5, 6, 7, 8]])
    plain = LlamaForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    base_answer = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    source_answer = PeftModel.from_pretrained(plain, tiny_adapter).generate(
        input_ids=prompt, max_new_tokens=12, do_sample=False
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    answer = loaded.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    assert answer.tolist() == source_answer.tolist()
    assert answer.tolist() != base_answer.tolist()


@pytest.mark.parametrize("ref", ["", "..", "../../x", "0", "3", "9" * 62, "a/b", "²"])
def test_unknown_references_are_not_found(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, ref: str
) -> None:
    AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    with pytest.raises(AdapterNotFound, match="ranch"):
        registry.resolve("ranch", ref)


def test_not_found_names_what_is_nearest(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    with pytest.raises(AdapterNotFound, match="there are none yet"):
        registry.resolve("ranch")
    AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base, "ranch-hand"))
    AdapterPromoter(registry).promote("ranch-hand", 1)
    with pytest.raises(AdapterNotFound, match="did you mean 'ranch-hand'"):
        registry.resolve("ranch-hnad")
    with pytest.raises(AdapterNotFound, match="did you mean 'champion'"):
        registry.resolve("ranch-hand", "champoin")
    with pytest.raises(AdapterNotFound, match="no version 7: it has 1"):
        registry.resolve("ranch-hand", "7")


@pytest.mark.promise("C4")
def test_serving_on_another_base_is_refused(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    manifest = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    check_base(manifest, tiny_base)
    other = Path(shutil.copytree(tiny_base.path, tmp_path / "tiny-llama"))
    check_base(manifest, BaseCheckpoint("tiny-llama", str(other), other, None))  # the same weights elsewhere

    with pytest.raises(AdapterRefused, match="base 'tiny-llama' and not 'other'"):
        check_base(manifest, BaseCheckpoint("other", str(other), other, None))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(AdapterRefused, match="weights with sha256"):
        check_base(manifest, BaseCheckpoint("tiny-llama", str(other), other, None))

    from_hub = manifest.model_copy(update={"base": manifest.base.model_copy(update={"revision": "abc"})})
    with pytest.raises(AdapterRefused, match="revision 'abc' and not 'def'"):
        check_base(from_hub, BaseCheckpoint("tiny-llama", "acme/tiny-llama", tiny_base.path, "def"))


@pytest.mark.promise("C4")
def test_changed_added_or_linked_files_are_refused_at_load(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    manifest = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    folder = registry.fetch(manifest)
    weights = folder / "adapter_model.safetensors"

    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin"):
        registry.fetch(manifest)
    (folder / "adapter_model.bin").unlink()

    weights.rename(tmp_path / "moved")
    with pytest.raises(AdapterRefused, match="is missing"):
        registry.fetch(manifest)
    weights.symlink_to(tmp_path / "moved")
    with pytest.raises(AdapterRefused, match="not a regular file"):
        registry.fetch(manifest)
    weights.unlink()

    content = bytearray((tmp_path / "moved").read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AdapterRefused, match="sha256"):
        registry.fetch(manifest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": {"../../../etc/passwd": {"sha256": "0", "size": 1}}}, "files"),
        ({"name": "other"}, "is for other@1"),
        ({"version": 2}, "is for ranch@2"),
        ({"schema_version": 3}, "schema_version"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damaged_manifest_is_an_error_of_that_version_only(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, change: dict[str, Any], reason: str
) -> None:
    manifest = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    second = AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    path = registry.fetch(manifest) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RegistryError, match=reason):
        registry.resolve("ranch", "1")
    assert registry.list() == [second]
    AdapterPromoter(registry).delete("ranch", 1)
    assert registry.versions("ranch") == [2]


@pytest.mark.promise("D12")
def test_read_only_registry_serves_on_and_refuses_in_one_line(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    out = run_script(
        """
        import ctypes
        AdapterPublisher(registry).register(source, draft)
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        def work():
            for folder in folders:
                folder.chmod(0o555)
            if os.geteuid() == 0:  # root writes anywhere until it gives up its capabilities
                header = (ctypes.c_uint32 * 2)(0x20080522, 0)
                assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
            assert whole() == [1] and registry.resolve("ranch").version == 1
            for change in (
                lambda: AdapterPublisher(registry).register(source, draft),
                lambda: AdapterPromoter(registry).promote("ranch", 1),
                lambda: AdapterPromoter(registry).delete("ranch", 1),
            ):
                try:
                    change()
                except RegistryError as error:
                    print(error, flush=True)
        assert os.waitpid(in_child(work), 0)[1] == 0
        for folder in folders:
            folder.chmod(0o755)
        assert whole() == [1]
        """,
        tmp_path / "registry",
        tiny_base,
        tiny_adapter,
    )
    lines = out.splitlines()
    assert [line.split("cannot ")[1].split(":")[0] for line in lines] == [
        "register 'ranch'",
        "promote ranch@1",
        "delete ranch@1",
    ]
    assert all("read-only for this user" in line for line in lines)


def test_file_in_place_of_the_registry_is_one_line(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    (tmp_path / "registry").write_text("not a folder")
    registry = AdapterRegistry(tmp_path / "registry")
    for call in (
        registry.names,
        registry.list,
        lambda: AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base)),
    ):
        with pytest.raises(RegistryError, match="Not a directory"):
            call()


@pytest.fixture
def bucket(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(f"memory://{tmp_path.name}/registry")


@pytest.mark.promise("D12", "D17")
def test_object_store_keeps_the_same_rules(
    bucket: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    import fsspec

    first = AdapterPublisher(bucket).register(tiny_adapter, draft(tiny_base))
    second = AdapterPublisher(bucket).register(tiny_adapter, draft(tiny_base))
    assert bucket.list() == [first, second]
    AdapterPromoter(bucket).promote("ranch", 1)
    AdapterPromoter(bucket).promote("ranch", 2)
    assert AdapterPromoter(bucket).rollback("ranch").manifest == bucket.resolve("ranch") == first
    AdapterPromoter(bucket).delete("ranch", 2)
    with pytest.raises(AdapterNotFound):
        bucket.fetch(second)
    assert AdapterPublisher(bucket).register(tiny_adapter, draft(tiny_base)).version == 3

    folder = bucket.fetch(first)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert folder.is_relative_to(tmp_path / "home")
    cached = folder / "adapter_model.safetensors"
    cached.write_bytes(b"damaged")
    assert bucket.fetch(first) == folder
    assert cached.read_bytes() == (tiny_adapter / "adapter_model.safetensors").read_bytes()

    remote = f"/{tmp_path.name}/registry/ranch/versions/000001/adapter_model.safetensors"
    fsspec.filesystem("memory").pipe_file(remote, b"damaged")
    shutil.rmtree(folder)
    with pytest.raises(AdapterRefused, match="sha256"):
        bucket.fetch(first)


@pytest.mark.promise("D12", "D17")
def test_version_without_manifest_does_not_exist_on_an_object_store(
    bucket: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    manifest = AdapterPublisher(bucket).register(tiny_adapter, draft(tiny_base))
    memory.pipe_file(f"/{tmp_path.name}/registry/ranch/versions/000002/adapter_config.json", b"{}")
    memory.pipe_file(f"/{tmp_path.name}/registry/ranch/claims/000003", b"")
    assert bucket.resolve("ranch") == manifest
    assert AdapterPublisher(bucket).register(tiny_adapter, draft(tiny_base)).version == 4


def test_store_that_cannot_be_opened_is_one_line() -> None:
    with pytest.raises(RegistryError, match="cannot be opened") as exc_info:
        AdapterRegistry("nosuchstore://x")
    assert "\n" not in str(exc_info.value)


def test_default_root_is_in_corral_home(tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path) -> None:
    manifest: AdapterManifest = AdapterPublisher(AdapterRegistry()).register(tiny_adapter, draft(tiny_base))
    assert AdapterRegistry().fetch(manifest).is_relative_to(tmp_path / "home" / "registry")


def test_reading_the_registry_needs_no_heavy_library() -> None:
    code = (
        "import sys, training.registry.registry\n"
        "print({'torch', 'transformers', 'peft', 'ray', 'numpy'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
