"""Promoting, rolling back and deleting versions, also while others write or die (D10, D12)."""

import json
import threading
from pathlib import Path

import pytest

from tests.training.registry.registries import draft, run_script
from training.base_models.resolve import BaseCheckpoint
from training.errors import AdapterNotFound, RegistryError
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterPublisher
from training.registry.registry import AdapterRegistry

pytestmark = pytest.mark.usefixtures("own_home")


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
