"""The registry as administrators see and change it, over HTTP and from a terminal.

Every change is one line of the audit log. What the registry allows is its own matter.
"""

from collections.abc import Mapping
from typing import Any

from deployments.protocol.adapters import Adapter, AdapterChange, AdapterVersion, Canary, DeletedVersion
from training.registry.aliases import Change, Traffic
from training.registry.audit import audited
from training.registry.manifest import AdapterManifest
from training.registry.promotion import AdapterPromoter
from training.registry.registry import AdapterRegistry


class AdapterAdmin:
    """One registry, and who changes it.

    Every method raises:
        AdapterNotFound: there is no such adapter, version or alias.
        RegistryConflict: aliases or canaries stand against the change.
        RegistryError: the registry cannot be read or written, or an alias has no acceptable name.

    Args:
        actor: as the audit log is to call them.
    """

    def __init__(self, registry: AdapterRegistry, actor: Mapping[str, Any]) -> None:
        self._registry = registry
        self._promoter = AdapterPromoter(registry)
        self._actor = actor

    def adapters(self) -> list[Adapter]:
        """Every adapter with all of its versions."""
        by_name: dict[str, list[AdapterManifest]] = {}
        for manifest in self._registry.list():
            by_name.setdefault(manifest.name, []).append(manifest)
        return [self._adapter(name, manifests) for name, manifests in by_name.items()]

    def adapter(self, name: str) -> Adapter:
        """One of them."""
        return self._adapter(name, [self._registry.manifest(name, v) for v in self._registry.versions(name)])

    def promote(self, name: str, version: int, alias: str, percent: float) -> AdapterChange:
        """Point an alias at a version; below 100 percent as a canary beside the champion."""
        with audited(self._actor, "promote", name, alias=alias, version=version, percent=percent) as record:
            change = self._promoter.promote(name, version, alias, percent)
            record |= {"before": change.before.record(), "after": change.after.record()}
        return _wire_change(change)

    def rollback(self, name: str, alias: str) -> AdapterChange:
        """End the canary, or point an alias at what it pointed at before."""
        with audited(self._actor, "rollback", name, alias=alias) as record:
            change = self._promoter.rollback(name, alias)
            record |= {"before": change.before.record(), "after": change.after.record()}
        return _wire_change(change)

    def delete_version(self, name: str, version: int) -> DeletedVersion:
        """Remove a version for good. Answers that replicas are making with it end as they would have."""
        with audited(self._actor, "delete", f"{name}@{version}"):
            self._promoter.delete(name, version)
        return DeletedVersion(name=name, version=version)

    def _adapter(self, name: str, manifests: list[AdapterManifest]) -> Adapter:
        aliases, canary = self._registry.aliases(name), canary_of(self._registry.traffic(name))
        versions = [_wire_version(manifest, aliases, canary) for manifest in manifests]
        return Adapter(name=name, aliases=aliases, canary=canary, versions=versions)


def canary_of(traffic: Traffic) -> Canary | None:
    """The canary as clients are told of it."""
    canary = traffic.canary
    return None if canary is None else Canary(version=canary.version, percent=canary.percent)


def _wire_version(manifest: AdapterManifest, aliases: Mapping[str, int], canary: Canary | None) -> AdapterVersion:
    return AdapterVersion(
        model_id=manifest.model_id,
        version=manifest.version,
        base_model=manifest.base.name,
        aliases=sorted(alias for alias, version in aliases.items() if version == manifest.version),
        canary_percent=canary.percent if canary is not None and canary.version == manifest.version else None,
        created=manifest.created,
        chat_format=manifest.chat_format,
        method=manifest.method,
        trained_from=None if manifest.parent is None else str(manifest.parent),
        run_name=manifest.run_name,
        metrics=manifest.metrics,
        forced=manifest.forced,
        forced_because=manifest.forced_because,
    )


def _wire_change(change: Change) -> AdapterChange:
    assert change.after.version is not None  # it was just set
    return AdapterChange(
        name=change.manifest.name,
        base_model=change.manifest.base.name,
        alias=change.alias,
        version=change.after.version,
        canary=canary_of(change.after),
        previous_version=change.before.version,
        previous_canary=canary_of(change.before),
    )
