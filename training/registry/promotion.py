"""Changing what a registry serves: aliases, the canary beside the champion, and deleting versions.

Every change happens under the adapter's lock file, and is one write that readers see or do not see.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from training.errors import AdapterNotFound, RegistryConflict, RegistryError
from training.registry.aliases import CHAMPION, Aliases, AliasState, Canary, Change
from training.registry.layout import check_alias, claim_path, suggestion, version_folder
from training.registry.manifest import MANIFEST_FILE
from training.registry.registry import AdapterRegistry

_MAX_HISTORY = 50  # earlier versions that an alias remembers for rollbacks


class AdapterPromoter:
    """Moves aliases and deletes versions of the registry that `registry` reads.

    Every method raises RegistryError when the disk or store fails, and AdapterNotFound for a name, version or alias
    that does not exist.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._storage = registry.storage
        self._aliases = Aliases(registry.storage)

    def promote(self, name: str, version: int, alias: str = CHAMPION, percent: float = 100) -> Change:
        """Point `alias` at `version`, from now on and for every reader.

        With `percent` below 100 the champion stays, and `version` becomes its canary for that share of the traffic;
        a second call changes the share, one with 100 finishes it.

        Raises:
            RegistryConflict: a canary was asked for of the champion itself, where there is none, or of another alias.
        """
        check_alias(alias)
        if not 0 < percent <= 100:
            raise RegistryError(f"{percent:g} percent are not accepted: give more than 0 and at most 100")
        if percent < 100 and alias != CHAMPION:
            raise RegistryConflict(
                f"alias {alias!r} cannot have a canary, only {CHAMPION!r} can: leave the percentage out"
            )
        self._registry.manifest(name, version)  # before there is a lock file
        with self._changing(name, f"promote {name}@{version}"):
            manifest = self._registry.manifest(name, version)  # a delete may have come first
            before, state = self._registry.traffic(name, alias), self._aliases.read(name, alias)
            if percent < 100:
                if state is None:
                    raise RegistryConflict(
                        f"adapter {name!r} has no champion, so its newest version gets everything: "
                        "promote the version that is to keep the rest first"
                    )
                if state.version == version:
                    raise RegistryConflict(f"{name}@{version} is the champion: name another version for a canary")
                self._start_canary(name, state, version, percent)
            elif state is None or state.version != version:
                self._point(name, alias, version, [*state.previous, state.version] if state else [])
            elif before.canary is not None:
                self._end_canary(name)
            return Change(alias, manifest, before, self._registry.traffic(name, alias))

    def rollback(self, name: str, alias: str = CHAMPION) -> Change:
        """End the canary; where there is none, point `alias` at what it pointed at before.

        Versions deleted since are left out.

        Raises:
            RegistryConflict: there is nothing to go back to.
        """
        check_alias(alias)
        known = self._registry.versions(name)
        with self._changing(name, f"roll back {name}@{alias}"):
            before, state = self._registry.traffic(name, alias), self._aliases.read(name, alias)
            if state is None:
                choice = suggestion(alias, self._aliases.names(name))
                raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}: {choice}")
            if before.canary is not None:
                manifest = self._registry.manifest(name, state.version)
                self._end_canary(name)
            else:
                earlier = [version for version in state.previous if version in known and version != state.version]
                if not earlier:
                    raise RegistryConflict(
                        f"alias {alias!r} of {name!r} pointed at nothing before version {state.version}: "
                        "promote a version instead"
                    )
                manifest = self._registry.manifest(name, earlier[-1])
                self._point(name, alias, earlier[-1], earlier[:-1])
            return Change(alias, manifest, before, self._registry.traffic(name, alias))

    def delete(self, name: str, version: int) -> None:
        """Remove a version for good; its number is not used again.

        Raises:
            RegistryConflict: an alias points at it, or it is the champion's canary.
        """
        self._registry.check_version(name, version)
        with self._changing(name, f"delete {name}@{version}"):
            holding = sorted(alias for alias, held in self._registry.aliases(name).items() if held == version)
            if holding:
                raise RegistryConflict(
                    f"{name}@{version} is what alias {holding[0]!r} points at: promote another version to it first"
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
        """Write an alias; a canary beside it ends."""
        state = AliasState(version=version, previous=[*previous][-_MAX_HISTORY:], updated=datetime.now(UTC))
        self._storage.write(f"{name}/aliases/{alias}.json", state.model_dump_json().encode())
        if alias == CHAMPION:
            self._end_canary(name)

    def _start_canary(self, name: str, champion: AliasState, version: int, percent: float) -> None:
        """Begin a canary, or change the one there is."""
        canary = Canary(version=version, percent=percent, champion=champion.version, since=champion.updated)
        self._storage.write(f"{name}/canary.json", canary.model_dump_json().encode())

    def _end_canary(self, name: str) -> None:
        """The champion gets everything again."""
        self._storage.remove(f"{name}/canary.json")

    @contextmanager
    def _changing(self, name: str, action: str) -> Iterator[None]:
        with self._storage.guard(action), self._storage.exclusive(f"{name}/.lock"):
            yield
