"""The registry on real disks and processes: versions, aliases, the gate on loss, faults (P C4, D12, E4)."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, AdapterRefused, RegistryError
from training.names import ModelId, parse_model_id
from training.registry.manifest import AdapterManifest, DatasetRef, check_base
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher, import_adapter
from training.registry.registry import AdapterRegistry

GOOD = {"eval_loss": 1.0, "base_eval_loss": 2.0}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: BaseCheckpoint) -> None:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "registry")


def draft(base: BaseCheckpoint, name: str = "ranch", metrics: dict[str, float] | None = None) -> AdapterDraft:
    return AdapterDraft(name=name, base=base, chat_format="chatml", metrics=GOOD if metrics is None else metrics)


def snapshot(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# Model ids


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("smollm2-135m", ("smollm2-135m", None, None)),
        ("smollm2-135m:ranch-hand", ("smollm2-135m", "ranch-hand", None)),
        ("smollm2-135m:ranch-hand@2", ("smollm2-135m", "ranch-hand", "2")),
        ("llama-2-7b:a.b_c@champion", ("llama-2-7b", "a.b_c", "champion")),
    ],
)
def test_model_id_forms(text: str, parts: tuple[str, str | None, str | None]) -> None:
    assert parse_model_id(text) == ModelId(*parts)
    assert str(parse_model_id(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", ":b", "a:b@", "a:B", "a@2", "a:b@2@3", "a:b:c", "a:../b", "a:b@../c", "a\n", "a:b\n", "a:b c"],
)
def test_other_model_ids_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(RegistryError, match="BASE:ADAPTER@VERSION"):
        parse_model_id(text)


# Versions


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


@pytest.mark.promise("C4")
def test_harmless_files_beside_the_adapter_stay_behind(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_adapter, tmp_path / "checkpoint"))
    for name in ("training_args.bin", "optimizer.pt", "README.md", "evil.py"):
        (source / name).write_bytes(b"x")
    folder = registry.fetch(AdapterPublisher(registry).register(source, draft(tiny_base)))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.promise("C4")
@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "-a", ".a", "a" * 64, "a\n", "ä", "a\0"])
def test_names_that_could_leave_the_root_are_refused(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(RegistryError, match="is not valid"):
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base, name))
    for read in (registry.resolve, registry.versions, registry.aliases):
        with pytest.raises(AdapterNotFound):
            read(name)
    assert not (tmp_path / "registry").exists()


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


# The gate on loss


@pytest.mark.parametrize(
    ("metrics", "min_improvement", "reason"),
    [
        ({}, 0.0, "lack eval_loss and base_eval_loss"),
        ({"eval_loss": 1.0}, 0.0, "lack base_eval_loss"),
        ({"eval_loss": float("nan"), "base_eval_loss": 2.0}, 0.0, "nan"),
        ({"eval_loss": 1.0, "base_eval_loss": float("inf")}, 0.0, "inf"),
        ({"eval_loss": 2.1, "base_eval_loss": 2.0}, 0.0, "2.1000, above the base's 2.0000"),
        ({"eval_loss": 1.9, "base_eval_loss": 2.0}, 0.5, "less than 0.5 below"),
    ],
)
def test_adapter_no_better_than_allowed_is_refused_unless_forced(
    registry: AdapterRegistry,
    tiny_base: BaseCheckpoint,
    tiny_adapter: Path,
    metrics: dict[str, float],
    min_improvement: float,
    reason: str,
) -> None:
    bad = draft(tiny_base, metrics=metrics)
    with pytest.raises(AdapterRefused, match=reason):
        AdapterPublisher(registry).register(tiny_adapter, bad, min_improvement=min_improvement)
    assert registry.names() == []
    forced = AdapterPublisher(registry).register(tiny_adapter, bad, force=True, min_improvement=min_improvement)
    assert forced.forced
    assert str(registry.manifest("ranch", 1).metrics) == str(metrics)


def test_force_is_recorded_only_where_it_was_needed(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    assert not AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base), force=True).forced


@pytest.mark.promise("C4")
def test_files_are_checked_also_when_forced(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_adapter, tmp_path / "spoilt"))
    with (source / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(AdapterRefused):
        AdapterPublisher(registry).register(source, draft(tiny_base), force=True)
    assert registry.names() == []


def test_import_needs_figures_or_force_and_the_same_base(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused, match="eval_loss"):
        import_adapter(registry, tiny_adapter, "guest", tiny_base, chat_format="chatml")
    assert import_adapter(registry, tiny_adapter, "guest", tiny_base, chat_format="chatml", force=True).forced
    assert not import_adapter(registry, tiny_adapter, "guest", tiny_base, chat_format="chatml", metrics=GOOD).forced
    other = BaseCheckpoint("llama-2-7b", "meta-llama/Llama-2-7b", tiny_base.path.parent / "elsewhere", None)
    with pytest.raises(AdapterRefused, match=r"tiny-llama.*meta-llama/Llama-2-7b"):
        import_adapter(registry, tiny_adapter, "guest", other, chat_format="chatml", force=True)


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


# Aliases and deletion


def test_promote_and_rollback(registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path) -> None:
    for _ in range(3):
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    assert registry.resolve("ranch").version == 3
    assert AdapterPromoter(registry).promote("ranch", 1).manifest.version == 1
    assert registry.resolve("ranch").version == 1
    AdapterPromoter(registry).promote("ranch", 2)
    AdapterPromoter(registry).promote("ranch", 2)
    AdapterPromoter(registry).promote("ranch", 3, "canary")
    assert registry.aliases("ranch") == {"champion": 2, "canary": 3}
    assert registry.resolve("ranch", "canary").version == 3

    assert AdapterPromoter(registry).rollback("ranch").manifest.version == 1
    assert registry.resolve("ranch", "champion").version == 1
    with pytest.raises(RegistryError, match="pointed at nothing before version 1"):
        AdapterPromoter(registry).rollback("ranch")
    with pytest.raises(AdapterNotFound, match="no alias 'beta'"):
        AdapterPromoter(registry).rollback("ranch", "beta")
    with pytest.raises(AdapterNotFound, match="no version 9"):
        AdapterPromoter(registry).promote("ranch", 9)
    with pytest.raises(RegistryError, match="not a number"):
        AdapterPromoter(registry).promote("ranch", 1, "2")


def test_delete_keeps_aliased_versions_and_never_gives_a_number_again(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    for _ in range(3):
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    AdapterPromoter(registry).promote("ranch", 2)
    AdapterPromoter(registry).promote("ranch", 1)
    with pytest.raises(RegistryError, match="alias 'champion' points at ranch@1: promote another"):
        AdapterPromoter(registry).delete("ranch", 1)
    gone = registry.manifest("ranch", 3)
    AdapterPromoter(registry).delete("ranch", 3)
    AdapterPromoter(registry).delete("ranch", 2)
    assert registry.versions("ranch") == [1]
    for call in (lambda: AdapterPromoter(registry).delete("ranch", 3), lambda: registry.fetch(gone)):
        with pytest.raises(AdapterNotFound, match="no version 3: it has 1"):
            call()
    with pytest.raises(RegistryError, match="promote a version instead"):
        AdapterPromoter(registry).rollback("ranch")  # version 2 is gone
    assert AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base)).version == 4


@pytest.mark.promise("D12")
def test_reader_racing_a_delete_gets_not_found_and_never_half(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    failures: list[Exception] = []
    num_complete = 0
    stop = threading.Event()

    def read() -> None:
        nonlocal num_complete
        reader = AdapterRegistry(registry.fetch(registry.manifest("ranch", 1)).parents[2])
        while not stop.is_set():
            try:
                reader.fetch(reader.resolve("ranch"))
                num_complete += 1
            except AdapterNotFound:
                continue
            except Exception as error:
                failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    for version in range(2, 22):
        AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
        AdapterPromoter(registry).delete("ranch", version)
    stop.set()
    reading.join()
    assert failures == []
    assert num_complete > 0


# Tampering


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


# Faults. Each script forks children of one prepared process, so that every child starts at once.

PRELUDE = """
import json, os, resource, signal, sys
from pathlib import Path
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, RegistryError
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry
import numpy

root, source, base_path = map(Path, sys.argv[1:4])
base = BaseCheckpoint("tiny-llama", str(base_path), base_path, None)
base.weights_sha256()
draft = AdapterDraft(
    name="ranch", base=base, chat_format="chatml", metrics={"eval_loss": 1.0, "base_eval_loss": 2.0}
)
registry = AdapterRegistry(root)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except RegistryError as error:
            print(error, flush=True)
            os._exit(1)
        except BaseException as error:
            print("traceback", repr(error), flush=True)
            os._exit(3)
    return child

def killed_at(step, work):
    "Run work in a child that kills itself before its step-th change below root; False if it got to the end."
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    def run():
        left = step
        def hook(event, arguments):
            nonlocal left
            # These announce themselves before they happen; os.open (mode None) is how a folder is synced.
            changes = event in ("os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir")
            changes = changes or (event == "open" and (arguments[1] is None or arguments[2] & writing))
            if changes and str(arguments[0]).startswith(str(root)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        work()
    status = os.waitpid(in_child(run), 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0

def whole():
    "Every version that can be seen is whole."
    manifests = registry.list()
    for manifest in manifests:
        registry.fetch(manifest)
    return [manifest.version for manifest in manifests]
"""


def run_script(script: str, root: Path, base: BaseCheckpoint, adapter: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(root), str(adapter), str(base.path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.promise("D12")
def test_kill_at_every_step_of_register_leaves_whole_versions(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    out = run_script(
        """
        AdapterPublisher(registry).register(source, draft)
        step, before = 0, whole()
        while killed_at(step, lambda: AdapterPublisher(registry).register(source, draft)):
            now = whole()
            assert now[:len(before)] == before and len(now) - len(before) <= 1, (step, before, now)
            step, before = step + 1, now
        assert len(whole()) == len(before) + 1
        print(step, len(whole()))
        """,
        tmp_path / "registry",
        tiny_base,
        tiny_adapter,
    )
    steps, versions = map(int, out.split())
    assert steps >= 12
    assert versions >= 3  # killed after the manifest's rename, and not killed


@pytest.mark.promise("D12")
def test_kill_at_every_step_of_promote_and_delete_leaves_old_or_new(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    run_script(
        """
        for _ in range(2):
            AdapterPublisher(registry).register(source, draft)
        AdapterPromoter(registry).promote("ranch", 1)
        step, old, new = 0, 1, 2
        while killed_at(step, lambda: AdapterPromoter(registry).promote("ranch", new)):
            assert registry.resolve("ranch").version in (1, 2)
            AdapterPromoter(registry).promote("ranch", old)
            step += 1
        assert step > 3 and registry.resolve("ranch").version == new

        step = 0
        while True:
            version = AdapterPublisher(registry).register(source, draft).version
            went_on = killed_at(step, lambda: AdapterPromoter(registry).delete("ranch", version))
            assert set(whole()) <= set(registry.versions("ranch"))
            if not went_on:
                break
            step += 1
        assert step > 3 and version not in registry.versions("ranch")
        """,
        tmp_path / "registry",
        tiny_base,
        tiny_adapter,
    )


@pytest.mark.promise("D12")
def test_eight_writers_get_eight_versions_and_one_alias_winner(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    out = run_script(
        """
        def work():
            for _ in range(3):
                AdapterPromoter(registry).promote("ranch", AdapterPublisher(registry).register(source, draft).version)
        children = [in_child(work) for _ in range(8)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
        history = json.loads((root / "ranch/aliases/champion.json").read_text())
        print(json.dumps([whole(), history]))
        """,
        tmp_path / "registry",
        tiny_base,
        tiny_adapter,
    )
    versions, champion = json.loads(out)
    assert versions == list(range(1, 25))
    assert sorted([*champion["previous"], champion["version"]]) == versions  # no promotion is lost


@pytest.mark.promise("D12")
def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    root = tmp_path / "registry"
    out = run_script(
        """
        AdapterPublisher(registry).register(source, draft)
        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            AdapterPublisher(registry).register(source, draft)
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 1
        assert whole() == [1]
        """,
        root,
        tiny_base,
        tiny_adapter,
    )
    assert "cannot register 'ranch': File too large: free some space" in out
    assert out.count("\n") == 1
    assert [path for path in snapshot(root) if "000002" in path or ".tmp" in path] == []


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


def test_what_dead_writers_left_is_swept_after_a_day_and_not_before(
    registry: AdapterRegistry, tiny_base: BaseCheckpoint, tiny_adapter: Path, tmp_path: Path
) -> None:
    AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base))
    versions = tmp_path / "registry" / "ranch" / "versions"
    old, young = versions / "000002" / "adapter_config.json", versions / "000003" / ".tmp-1"
    for path in (old, young):
        path.parent.mkdir()
        path.write_text("{}")
    os.utime(old, (0, 0))
    assert registry.versions("ranch") == [1]
    assert AdapterPublisher(registry).register(tiny_adapter, draft(tiny_base)).version == 4
    assert not old.exists()
    assert young.exists()


# Other stores


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
