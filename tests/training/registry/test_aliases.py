"""Canary, promotion and rollback in the registry, on a disk and on an object store."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import register_three
from training.base_models.resolve import BaseCheckpoint
from training.errors import RegistryConflict, RegistryError
from training.registry.aliases import Canary, Traffic, draw
from training.registry.promotion import AdapterPromoter
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry

IDENTITIES = [f"user:{number}" for number in range(2000)]


@pytest.fixture(params=["disk", "object store"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> Iterator[AdapterRegistry]:
    """Three versions of `ranch`, the second of them the champion."""
    root = str(tmp_path / "registry") if request.param == "disk" else f"memory://{tmp_path.name}/registry"
    registry = AdapterRegistry(root)
    register_three(registry, tiny_base, tiny_adapter)
    yield registry
    if request.param != "disk":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def share(registry: AdapterRegistry, version: int, ref: str | None = None) -> float:
    """The percentage of the identities that get this version."""
    versions = [registry.resolve("ranch", ref, identity).version for identity in IDENTITIES]
    return versions.count(version) / len(versions) * 100


@given(st.text(), st.integers(1, 10**9), st.integers(1, 10**9), st.floats(0.001, 99.999), st.floats(0.001, 99.999))
def test_a_draw_is_below_100_and_who_is_in_stays_in_as_the_share_grows(
    identity: str, champion: int, version: int, a: float, b: float
) -> None:
    assert 0 <= draw("ranch", champion, version, identity) < 100
    small, large = (
        Canary(version=version, percent=percent, champion=champion, since="2026-01-01T00:00:00Z")  # type: ignore[arg-type]
        for percent in sorted((a, b))
    )
    assert small.takes("ranch", identity) <= large.takes("ranch", identity)


def test_draws_are_uniform_and_independent_for_another_pair_of_versions() -> None:
    draws = sorted(draw("ranch", 2, 3, identity) for identity in IDENTITIES)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand times; these identities are always the same
    distance = max(abs(value / 100 - rank / len(draws)) for rank, value in enumerate(draws))
    assert distance < 1.95 / len(draws) ** 0.5
    first = {identity for identity in IDENTITIES if draw("ranch", 2, 3, identity) < 10}
    for other in (
        {i for i in IDENTITIES if draw("ranch", 3, 4, i) < 10},
        {i for i in IDENTITIES if draw("x", 2, 3, i) < 10},
    ):
        assert 0 < len(first & other) < len(first) / 3  # a tenth is by chance


def test_a_canary_takes_its_share_of_what_is_asked_of_the_champion(registry: AdapterRegistry) -> None:
    before = registry.traffic("ranch")
    change = AdapterPromoter(registry).promote("ranch", 3, percent=10)
    assert (change.before, change.manifest.version) == (before, 3)
    assert change.after.record() == {"version": 2, "canary": 3, "percent": 10}
    expected = sum(draw("ranch", 2, 3, identity) < 10 for identity in IDENTITIES) / len(IDENTITIES) * 100
    assert 8 < expected < 12
    assert share(registry, 3) == share(registry, 3, "champion") == expected
    assert registry.resolve("ranch").version == 2  # no identity: a command, not traffic
    assert share(registry, 1, "1") == 100
    AdapterPromoter(registry).promote("ranch", 3, "next")
    assert registry.aliases("ranch") == {"champion": 2, "next": 3}

    AdapterPromoter(registry).promote("ranch", 3, percent=50)
    assert 45 < share(registry, 3) < 55
    finished = AdapterPromoter(registry).promote("ranch", 3)
    assert (finished.after, share(registry, 3)) == (Traffic(3), 100)
    assert AdapterPromoter(registry).rollback("ranch").after == Traffic(2)


def test_rollback_ends_a_canary_and_leaves_the_champion(registry: AdapterRegistry) -> None:
    AdapterPromoter(registry).promote("ranch", 3, percent=10)
    change = AdapterPromoter(registry).rollback("ranch")
    assert (change.manifest.version, change.after) == (2, Traffic(2))
    assert share(registry, 2) == 100
    assert AdapterPromoter(registry).rollback("ranch").after == Traffic(1)  # the previous one, as without a canary
    AdapterPromoter(registry).promote("ranch", 3, percent=10)
    assert AdapterPromoter(registry).promote("ranch", 1).after == Traffic(1)  # the champion, promoted again


def test_a_canary_ends_with_the_alias_it_stood_beside_whoever_moves_it(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    AdapterPromoter(registry).promote("ranch", 3, percent=10)
    storage = registry.storage
    canary, alias = storage.read("ranch/canary.json"), json.loads(storage.read("ranch/aliases/champion.json"))
    AdapterPromoter(registry).promote("ranch", 1)
    storage.write("ranch/canary.json", canary)  # as left by a writer that died, or that does not know canaries
    assert registry.traffic("ranch") == Traffic(1)
    AdapterPromoter(registry).promote("ranch", 2)
    storage.write("ranch/canary.json", canary)
    assert registry.traffic("ranch") == Traffic(2)  # the same champion as then, but not the same promotion
    assert set(alias) == {"version", "previous", "updated"}  # the format that every version of Corral reads


def test_damage_and_deletion_by_other_hands_leave_the_champion(registry: AdapterRegistry) -> None:
    AdapterPromoter(registry).promote("ranch", 3, percent=99)
    registry.storage.remove("ranch/versions/000003/manifest.json")
    assert share(registry, 2) == 100
    registry.storage.write("ranch/canary.json", b"{")
    assert share(registry, 2) == 100
    assert AdapterPromoter(registry).promote("ranch", 1, percent=10).after.record() == {
        "version": 2,
        "canary": 1,
        "percent": 10,
    }


def test_a_refused_change_names_its_reason(registry: AdapterRegistry) -> None:
    AdapterPromoter(registry).promote("ranch", 3, percent=10)
    with pytest.raises(RegistryConflict, match="ranch@3 is the canary for 10 % of the traffic: roll back first"):
        AdapterPromoter(registry).delete("ranch", 3)
    with pytest.raises(RegistryConflict, match="alias 'champion' points at"):
        AdapterPromoter(registry).delete("ranch", 2)
    with pytest.raises(RegistryConflict, match="ranch@2 is the champion: choose another version"):
        AdapterPromoter(registry).promote("ranch", 2, percent=10)
    for percent in (0, -1, 100.1, float("nan")):
        with pytest.raises(RegistryError, match="greater than 0 and at most 100"):
            AdapterPromoter(registry).promote("ranch", 3, percent=percent)
    with pytest.raises(RegistryError, match="only 'champion' can"):
        AdapterPromoter(registry).promote("ranch", 3, "next", 10)
    assert registry.traffic("ranch").record() == {"version": 2, "canary": 3, "percent": 10}


def test_without_a_champion_there_is_nothing_to_compare_with(
    tmp_path: Path, tiny_base: BaseCheckpoint, tiny_adapter: Path
) -> None:
    registry = AdapterRegistry(tmp_path / "registry")
    draft = AdapterDraft(name="ranch", base=tiny_base, chat_format="chatml")
    AdapterPublisher(registry).register(tiny_adapter, draft, force=True)
    with pytest.raises(RegistryConflict, match="has no champion, so its newest version gets all requests"):
        AdapterPromoter(registry).promote("ranch", 1, percent=10)
