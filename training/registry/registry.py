"""The adapter registry as readers see it: immutable versions of LoRA adapters, and aliases that point at them.

    ROOT/NAME/versions/000002/  adapter_config.json, adapter_model.safetensors, manifest.json
    ROOT/NAME/aliases/champion.json, ROOT/NAME/canary.json
    ROOT/NAME/claims/000002     empty, stays for good: the number of a deleted version names nothing else

ROOT is any fsspec path. A version exists when its manifest does, so no reader sees half of one. Nothing here writes:
`publish` adds versions, `promotion` moves aliases and deletes.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from training.errors import AdapterNotFound, AdapterRefused, RegistryError
from training.home import corral_home
from training.names import ADAPTER_NAME
from training.registry.aliases import CHAMPION, Aliases, Traffic, first_error
from training.registry.layout import (
    PUBLISHED,
    check_name,
    suggestion,
    version_folder,
)
from training.registry.local_copies import verified_copy, verify
from training.registry.manifest import (
    MANIFEST_FILE,
    AdapterManifest,
)
from training.storage import Storage

logger = logging.getLogger(__name__)


class AdapterRegistry:
    """A registry at `root`, by default in `CORRAL_HOME`; the first published adapter creates it. Reads only.

    Every method raises RegistryError when the disk or store fails, and AdapterNotFound for a name, version or
    alias that is not there.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.storage = Storage(corral_home() / "registry" if root is None else root)
        self._aliases = Aliases(self.storage)

    def resolve(self, name: str, ref: str | None = None, identity: str | None = None) -> AdapterManifest:
        """The version that `ref` (a number or an alias) means; without one the champion, else the newest.

        Args:
            identity: who asks. With one, a canary takes its share of what is asked of the champion; without, none.
        """
        check_name(name)
        if ref is not None and not ADAPTER_NAME.fullmatch(ref):
            raise AdapterNotFound(f"adapter {name!r:.80} has no {ref!r:.80}: that is neither a version nor an alias")
        if ref is not None and ref.isdecimal():
            return self.manifest(name, int(ref))
        traffic = self.traffic(name, ref or CHAMPION)
        if traffic.version is None:
            newest = self.versions(name)[-1]
            if ref is None:
                return self.manifest(name, newest)
            raise AdapterNotFound(
                f"adapter {name!r} has no alias {ref!r}: {suggestion(ref, self._aliases.names(name))}"
            )
        if identity is not None and traffic.canary is not None and traffic.canary.takes(name, identity):
            with suppress(AdapterNotFound):  # deleted by a Corral that knows of no canaries
                return self.manifest(name, traffic.canary.version)
        return self.manifest(name, traffic.version)

    def names(self) -> list[str]:
        """Every adapter with at least one version."""
        return sorted({name for name, _ in self._published()})

    def versions(self, name: str) -> list[int]:
        """The published versions of `name`, oldest first, at least one."""
        check_name(name)
        found = sorted(version for _, version in self._published(f"{name}/versions"))
        if not found:
            raise AdapterNotFound(f"there is no adapter {name!r}: {suggestion(name, self.names())}")
        return found

    def manifest(self, name: str, version: int) -> AdapterManifest:
        """The manifest of one version."""
        check_name(name)
        text = self.storage.read_if_there(f"{version_folder(name, version)}/{MANIFEST_FILE}")
        if text is None:
            known = ", ".join(map(str, self.versions(name)))
            raise AdapterNotFound(f"adapter {name!r} has no version {version}: it has {known}")
        try:
            manifest = AdapterManifest.model_validate_json(text)
        except ValidationError as error:
            raise RegistryError(
                f"the manifest of {name}@{version} is damaged ({first_error(error)}): restore it, or delete the version"
            ) from error
        if (manifest.name, manifest.version) != (name, version):
            raise RegistryError(
                f"the manifest of {name}@{version} speaks of {manifest.name}@{manifest.version}: "
                "restore it, or delete the version"
            )
        return manifest

    def ancestors(self, manifest: AdapterManifest) -> list[AdapterManifest]:
        """The versions that training went on from, the nearest first.

        The last one's `parent` is None where that was trained from the base; else that parent is no longer there, or
        has other weights now.
        """
        found: list[AdapterManifest] = []
        parent = manifest.parent
        while parent is not None and str(parent) not in {f"{older.name}@{older.version}" for older in found}:
            try:
                older = self.manifest(parent.name, parent.version)
            except AdapterNotFound:
                break
            if older.weights_sha256 != parent.weights_sha256:
                break
            found.append(older)
            parent = older.parent
        return found

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of `name` and the versions they point at."""
        check_name(name)
        states = {alias: self._aliases.read(name, alias) for alias in self._aliases.names(name)}
        return {alias: state.version for alias, state in states.items() if state is not None}

    def traffic(self, name: str, alias: str = CHAMPION) -> Traffic:
        """Where requests for `alias` go now; only the champion can have a canary."""
        check_name(name)
        state = self._aliases.read(name, alias)
        if state is None:
            return Traffic(None)
        return Traffic(state.version, self._aliases.canary(name, state) if alias == CHAMPION else None)

    def fetch(self, manifest: AdapterManifest) -> Path:
        """A directory on this machine with the version's files, every byte checked against the manifest.

        On a local disk that is the registry's own directory; from an object store, a copy in `CORRAL_HOME`.

        Raises:
            AdapterRefused: a file is missing, changed or not one of the manifest's.
        """
        self.check_version(manifest.name, manifest.version)
        folder = version_folder(manifest.name, manifest.version)
        with self.storage.guard(f"read {manifest.name}@{manifest.version}"):
            directory = self.storage.local_path(folder)
            try:
                if directory is None:
                    return verified_copy(self.storage, folder, manifest)
                verify(directory, manifest)
                return directory
            except (AdapterRefused, FileNotFoundError):
                self.check_version(manifest.name, manifest.version)  # deleted meanwhile?
                raise

    def _published(self, path: str = "") -> Iterator[tuple[str, int]]:
        with self.storage.guard("read it"):
            found = self.storage.find(path)
        for match in filter(None, map(PUBLISHED.fullmatch, found)):
            if ADAPTER_NAME.fullmatch(match[1]):
                yield match[1], int(match[2])

    def check_version(self, name: str, version: int) -> None:
        """Raise AdapterNotFound unless `version` of `name` is published."""
        known = self.versions(name)
        if version not in known:
            raise AdapterNotFound(f"adapter {name!r} has no version {version}: it has {', '.join(map(str, known))}")

    def list(self) -> list[AdapterManifest]:
        """Every version of every adapter; a damaged manifest is logged and left out."""
        manifests = []
        for name, version in sorted(self._published()):
            try:
                manifests.append(self.manifest(name, version))
            except AdapterNotFound:
                continue  # deleted meanwhile
            except RegistryError as error:
                logger.warning("%s", error)
        return manifests
