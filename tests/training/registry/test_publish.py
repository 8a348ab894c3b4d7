"""Publishing versions: what the gate refuses, imports, and writers that are killed, race or run out of disk (D12)."""

import os
import shutil
from pathlib import Path

import pytest

from tests.training.registry.registries import GOOD, draft, run_script, snapshot
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, AdapterRefused, RegistryError
from training.registry.publish import AdapterPublisher, import_adapter
from training.registry.registry import AdapterRegistry

pytestmark = pytest.mark.usefixtures("own_home")


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
