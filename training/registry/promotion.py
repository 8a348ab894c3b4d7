"""Changes to what a registry serves: moving aliases, starting and ending canaries, deleting versions.

Every change is made under the adapter's lock file and takes effect with a single write.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from training.errors import AdapterNotFound, RegistryConflict, RegistryError
from training.registry.aliases import CHAMPION, Aliases, AliasState, Canary, Change
from training.registry.layout import check_alias, claim_path, suggestion, version_folder
from training.registry.manifest import MANIFEST_FILE
from training.registry.registry import AdapterRegistry

_MAX_HISTORY = 50  # previous versions that an alias keeps for rollbacks


class AdapterPromoter:
    """Moves aliases and deletes versions of the registry that `registry` reads.

    Every method raises RegistryError if the disk or store fails, and AdapterNotFound for a name, version or alias
    that does not exist.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._storage = registry.storage
        self._aliases = Aliases(registry.storage)

    def promote(self, name: str, version: int, alias: str = CHAMPION, percent: float = 100) -> Change:
        """Point `alias` at `version`.

        With `percent` below 100 the champion stays, and `version` becomes its canary for that share of the traffic.
        Another call changes the share; a call with 100 completes the promotion.

        Raises:
            RegistryConflict: a canary is requested for an alias other than the champion, while there is no champion,
                or with the champion's own version.
        """
        check_alias(alias)
        if not 0 < percent <= 100:
            raise RegistryError(f"percent must be greater than 0 and at most 100, got {percent:g}")
        if percent < 100 and alias != CHAMPION:
            raise RegistryConflict(f"alias {alias!r} cannot have a canary, only {CHAMPION!r} can: omit the percentage")
        self._registry.manifest(name, version)  # before a lock file is created
        with self._exclusive(name, f"promote {name}@{version}"):
            manifest = self._registry.manifest(name, version)  # it may have been deleted before the lock was taken
            before, state = self._registry.traffic(name, alias), self._aliases.read(name, alias)
            if percent < 100:
                if state is None:
                    raise RegistryConflict(
                        f"adapter {name!r} has no champion, so its newest version gets all requests: "
                        "first promote the version that is to keep the rest of them"
                    )
                if state.version == version:
                    raise RegistryConflict(f"{name}@{version} is the champion: choose another version for a canary")
                self._start_canary(name, state, version, percent)
            elif state is None or state.version != version:
                self._point(name, alias, version, [*state.previous, state.version] if state else [])
            elif before.canary is not None:
                self._end_canary(name)
            return Change(alias, manifest, before, self._registry.traffic(name, alias))

    def rollback(self, name: str, alias: str = CHAMPION) -> Change:
        """End the canary; without one, point `alias` at its previous version.

        Versions that were deleted since are skipped.

        Raises:
            RegistryConflict: there is no previous version.
        """
        check_alias(alias)
        existing = self._registry.versions(name)
        with self._exclusive(name, f"roll back {name}@{alias}"):
            before, state = self._registry.traffic(name, alias), self._aliases.read(name, alias)
            if state is None:
                hint = suggestion(alias, self._aliases.names(name))
                raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}: {hint}")
            if before.canary is not None:
                manifest = self._registry.manifest(name, state.version)
                self._end_canary(name)
            else:
                earlier = [version for version in state.previous if version in existing and version != state.version]
                if not earlier:
                    raise RegistryConflict(
                        f"alias {alias!r} of {name!r} pointed at nothing before version {state.version}: "
                        "promote a version instead"
                    )
                manifest = self._registry.manifest(name, earlier[-1])
                self._point(name, alias, earlier[-1], earlier[:-1])
            return Change(alias, manifest, before, self._registry.traffic(name, alias))

    def delete(self, name: str, version: int) -> None:
        """Delete a version permanently; its number is never reused.

        Raises:
            RegistryConflict: an alias points at it, or it is the champion's canary.
        """
        self._registry.check_version(name, version)
        with self._exclusive(name, f"delete {name}@{version}"):
            aliases = sorted(alias for alias, target in self._registry.aliases(name).items() if target == version)
            if aliases:
                raise RegistryConflict(
                    f"alias {aliases[0]!r} points at {name}@{version}: promote another version to it first"
                )
            canary = self._registry.traffic(name).canary
            if canary is not None and canary.version == version:
                raise RegistryConflict(
                    f"{name}@{version} is the canary for {canary.percent:g} % of the traffic: roll back first"
                )
            self._storage.create(claim_path(name, version))
            self._storage.remove(f"{version_folder(name, version)}/{MANIFEST_FILE}")
            self._storage.remove_folder(version_folder(name, version))

    def _point(self, name: str, alias: str, version: int, previous: Sequence[int]) -> None:
        """Write an alias; if it is the champion, this ends its canary."""
        state = AliasState(version=version, previous=[*previous][-_MAX_HISTORY:], updated=datetime.now(UTC))
        self._storage.write(f"{name}/aliases/{alias}.json", state.model_dump_json().encode())
        if alias == CHAMPION:
            self._end_canary(name)

    def _start_canary(self, name: str, champion: AliasState, version: int, percent: float) -> None:
        """Start a canary, or change the current one."""
        canary = Canary(version=version, percent=percent, champion=champion.version, since=champion.updated)
        self._storage.write(f"{name}/canary.json", canary.model_dump_json().encode())

    def _end_canary(self, name: str) -> None:
        """Send all requests to the champion again."""
        self._storage.remove(f"{name}/canary.json")

    @contextmanager
    def _exclusive(self, name: str, action: str) -> Iterator[None]:
        with self._storage.guard(action), self._storage.exclusive(f"{name}/.lock"):
            yield
