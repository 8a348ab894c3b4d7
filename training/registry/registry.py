"""The adapter registry: immutable versions of LoRA adapters, and aliases that point at them.

    ROOT/NAME/versions/000002/  adapter_config.json, adapter_model.safetensors, manifest.json
    ROOT/NAME/aliases/champion.json, ROOT/NAME/canary.json (training.registry.aliases)
    ROOT/NAME/claims/000002     empty, stays for good: the number of a deleted version names nothing else

Training publishes here, serving and the command line read here; ROOT is any fsspec path. A writer claims the
next number, copies the files and writes the manifest last: a version exists when its manifest does, so no reader
sees half of one. What the files must be is `training.registry.adapter_files`' business.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.base_models.resolve import BaseModel, Quantization
from training.errors import AdapterNotFound, AdapterRefused, RegistryConflict, RegistryError
from training.home import corral_home
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, LoraShape, read_adapter
from training.registry.aliases import CHAMPION, Aliases, Canary, Change, Traffic, first_error
from training.registry.gate import check_evaluated, objection
from training.registry.local_copies import verified_copy, verify
from training.registry.manifest import (
    ADAPTER_NAME,
    MANIFEST_FILE,
    AdapterManifest,
    BaseRef,
    DatasetRef,
    Environment,
    FileRef,
    Method,
    ModelId,
    ParentRef,
    SampleAnswer,
    check_base,
    parse_model_id,
)
from training.storage import TEMPORARY_PREFIX, Storage

__all__ = [
    "ADAPTER_NAME",
    "CHAMPION",
    "AdapterDraft",
    "AdapterManifest",
    "AdapterRegistry",
    "BaseRef",
    "Canary",
    "Change",
    "DatasetRef",
    "Environment",
    "FileRef",
    "LoraShape",
    "ModelId",
    "ParentRef",
    "SampleAnswer",
    "Traffic",
    "check_base",
    "import_adapter",
    "parse_model_id",
]

_PUBLISHED = re.compile(r"([^/]+)/versions/(\d{6,9})/manifest\.json")
_NUMBERED = re.compile(r"[^/]+/(?:claims|versions)/(\d{6,9})(?:/.*)?")
_STALE_S = 24 * 3600  # after this, what a dead writer left behind is removed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDraft:
    """What the caller of `register` knows; the rest of the manifest is read from the files.

    Attributes:
        base: the base that the adapter was trained on; its hash and shapes are taken from its files.
        chat_format: the resolved name, never `auto`.
        metrics: should hold `eval_loss` and `base_eval_loss`, the held-out loss with and without the adapter.
        config: the resolved training configuration, JSON values only.
        evaluated_sha256: of the weights that `metrics` were computed with, where they were loaded from their file.
        changes: whether `training.trainer.evaluate` saw any output differ from the base's; None if it did not look.
        parent: the version that training went on from.
        environment: code, libraries and devices of the run.
        samples: held-out prompts, answered by base and adapter.
    """

    name: str
    base: BaseModel
    chat_format: str
    quantization: Quantization = field(default_factory=Quantization)
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: DatasetRef | None = None
    config: dict[str, Any] | None = None
    run_name: str | None = None
    evaluated_sha256: str | None = None
    changes: bool | None = None
    method: Method | None = None
    parent: ParentRef | None = None
    environment: Environment | None = None
    samples: Sequence[SampleAnswer] = ()


class AdapterRegistry:
    """A registry at `root`, by default in `CORRAL_HOME`; made by the first `register`.

    Every method raises RegistryError when the disk or store fails, and AdapterNotFound for a name, version or
    alias that is not there.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self._storage = Storage(corral_home() / "registry" if root is None else root)
        self._aliases = Aliases(self._storage)

    def register(
        self, source_dir: Path, draft: AdapterDraft, *, force: bool = False, min_improvement: float = 0.0
    ) -> AdapterManifest:
        """Check the PEFT adapter in `source_dir` and publish it as the next version of `draft.name`.

        The adapter must change something, and its held-out loss be at least `min_improvement` (nats) below the
        base's and not above its parent's. `force` overrides these three, and no other check; the manifest then says
        `forced` and why.

        Raises:
            AdapterRefused: the files are not a plain LoRA adapter of this base, it is no better than the base or
                worse than its parent, or the weights are not those that were evaluated.
        """
        _check_name(draft.name, RegistryError)
        if draft.chat_format == "auto":
            raise RegistryError("chat format 'auto' cannot be recorded: give the name that it stands for")
        adapter = read_adapter(source_dir, draft.base)
        check_evaluated(draft.evaluated_sha256, adapter.weights_sha256)
        reason = objection(draft.metrics, min_improvement, changes=adapter.changes and draft.changes is not False)
        if reason and not force:
            raise AdapterRefused(f"adapter {draft.name!r} is not registered: {reason}, or force it")
        base = draft.base
        with self._storage.guard(f"register {draft.name!r}"):
            base_ref = BaseRef(
                name=base.name, source=base.source, revision=base.revision, weights_sha256=base.weights_sha256()
            )
            self._sweep(draft.name)
            version = self._claim(draft.name)
            try:
                return self._publish(draft, base_ref, version, adapter, forced_because=reason)
            except BaseException:
                self._give_up(draft.name, version)
                raise

    def resolve(self, name: str, ref: str | None = None, identity: str | None = None) -> AdapterManifest:
        """The version that `ref` (a number or an alias) means; without one the champion, else the newest.

        Args:
            identity: who asks. With one, a canary takes its share of what is asked of the champion; without, none.
        """
        _check_name(name)
        if ref is not None and not ADAPTER_NAME.fullmatch(ref):
            raise AdapterNotFound(f"adapter {name!r:.80} has no {ref!r:.80}: that is neither a version nor an alias")
        if ref is not None and ref.isdecimal():
            return self.manifest(name, int(ref))
        traffic = self.traffic(name, ref or CHAMPION)
        if traffic.version is None:
            newest = self.versions(name)[-1]
            if ref is None:
                return self.manifest(name, newest)
            raise AdapterNotFound(f"adapter {name!r} has no alias {ref!r}: {_choice(ref, self._aliases.names(name))}")
        if identity is not None and traffic.canary is not None and traffic.canary.takes(name, identity):
            with suppress(AdapterNotFound):  # deleted by a Corral that knows of no canaries
                return self.manifest(name, traffic.canary.version)
        return self.manifest(name, traffic.version)

    def names(self) -> list[str]:
        """Every adapter with at least one version."""
        return sorted({name for name, _ in self._published()})

    def versions(self, name: str) -> list[int]:
        """The published versions of `name`, oldest first, at least one."""
        _check_name(name)
        found = sorted(version for _, version in self._published(f"{name}/versions"))
        if not found:
            raise AdapterNotFound(f"there is no adapter {name!r}: {_choice(name, self.names())}")
        return found

    def manifest(self, name: str, version: int) -> AdapterManifest:
        """The manifest of one version."""
        _check_name(name)
        text = self._storage.read_if_there(f"{_folder(name, version)}/{MANIFEST_FILE}")
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
        _check_name(name)
        states = {alias: self._aliases.read(name, alias) for alias in self._aliases.names(name)}
        return {alias: state.version for alias, state in states.items() if state is not None}

    def traffic(self, name: str, alias: str = CHAMPION) -> Traffic:
        """Where requests for `alias` go now; only the champion can have a canary."""
        _check_name(name)
        state = self._aliases.read(name, alias)
        if state is None:
            return Traffic(None)
        return Traffic(state.version, self._aliases.canary(name, state) if alias == CHAMPION else None)

    def promote(self, name: str, version: int, alias: str = CHAMPION, percent: float = 100) -> Change:
        """Point `alias` at `version`, from now on and for every reader.

        With `percent` below 100 the champion stays, and `version` becomes its canary for that share of the traffic;
        a second call changes the share, one with 100 finishes it.

        Raises:
            RegistryConflict: a canary was asked for of the champion itself, where there is none, or of another alias.
        """
        _check_alias(alias)
        if not 0 < percent <= 100:
            raise RegistryError(f"{percent:g} percent are not accepted: give more than 0 and at most 100")
        if percent < 100 and alias != CHAMPION:
            raise RegistryConflict(
                f"alias {alias!r} cannot have a canary, only {CHAMPION!r} can: leave the percentage out"
            )
        self.manifest(name, version)  # before there is a lock file
        with self._changing(name, f"promote {name}@{version}"):
            manifest = self.manifest(name, version)  # a delete may have come first
            before, state = self.traffic(name, alias), self._aliases.read(name, alias)
            if percent < 100:
                if state is None:
                    raise RegistryConflict(
                        f"adapter {name!r} has no champion, so its newest version gets everything: "
                        "promote the version that is to keep the rest first"
                    )
                if state.version == version:
                    raise RegistryConflict(f"{name}@{version} is the champion: name another version for a canary")
                self._aliases.start_canary(name, state, version, percent)
            elif state is None or state.version != version:
                self._aliases.point(name, alias, version, [*state.previous, state.version] if state else [])
            elif before.canary is not None:
                self._aliases.end_canary(name)
            return Change(alias, manifest, before, self.traffic(name, alias))

    def rollback(self, name: str, alias: str = CHAMPION) -> Change:
        """End the canary; where there is none, point `alias` at what it pointed at before.

        Versions deleted since are left out.

        Raises:
            RegistryConflict: there is nothing to go back to.
        """
        _check_alias(alias)
        known = self.versions(name)
        with self._changing(name, f"roll back {name}@{alias}"):
            before, state = self.traffic(name, alias), self._aliases.read(name, alias)
            if state is None:
                choice = _choice(alias, self._aliases.names(name))
                raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}: {choice}")
            if before.canary is not None:
                manifest = self.manifest(name, state.version)
                self._aliases.end_canary(name)
            else:
                earlier = [version for version in state.previous if version in known and version != state.version]
                if not earlier:
                    raise RegistryConflict(
                        f"alias {alias!r} of {name!r} pointed at nothing before version {state.version}: "
                        "promote a version instead"
                    )
                manifest = self.manifest(name, earlier[-1])
                self._aliases.point(name, alias, earlier[-1], earlier[:-1])
            return Change(alias, manifest, before, self.traffic(name, alias))

    def delete(self, name: str, version: int) -> None:
        """Remove a version for good; its number is not used again.

        Raises:
            RegistryConflict: an alias points at it, or it is the champion's canary.
        """
        self._check_version(name, version)
        with self._changing(name, f"delete {name}@{version}"):
            holding = sorted(alias for alias, held in self.aliases(name).items() if held == version)
            if holding:
                raise RegistryConflict(
                    f"{name}@{version} is what alias {holding[0]!r} points at: promote another version to it first"
                )
            canary = self.traffic(name).canary
            if canary is not None and canary.version == version:
                raise RegistryConflict(
                    f"{name}@{version} is the canary for {canary.percent:g} % of the traffic: roll back first"
                )
            self._storage.create(_claim_path(name, version))
            self._storage.remove(f"{_folder(name, version)}/{MANIFEST_FILE}")
            self._storage.remove_folder(_folder(name, version))

    def fetch(self, manifest: AdapterManifest) -> Path:
        """A directory on this machine with the version's files, every byte checked against the manifest.

        On a local disk that is the registry's own directory; from an object store, a copy in `CORRAL_HOME`.

        Raises:
            AdapterRefused: a file is missing, changed or not one of the manifest's.
        """
        self._check_version(manifest.name, manifest.version)
        folder = _folder(manifest.name, manifest.version)
        with self._storage.guard(f"read {manifest.name}@{manifest.version}"):
            directory = self._storage.local_path(folder)
            try:
                if directory is None:
                    return verified_copy(self._storage, folder, manifest)
                verify(directory, manifest)
                return directory
            except (AdapterRefused, FileNotFoundError):
                self._check_version(manifest.name, manifest.version)  # deleted meanwhile?
                raise

    def _publish(
        self, draft: AdapterDraft, base: BaseRef, version: int, adapter: AdapterFiles, *, forced_because: str | None
    ) -> AdapterManifest:
        folder = _folder(draft.name, version)
        copied = self._storage.upload(adapter.weights, f"{folder}/{WEIGHTS_FILE}")
        if copied != adapter.weights_sha256:
            raise AdapterRefused(f"{adapter.weights} changed while it was registered: register it when it is complete")
        self._storage.write(f"{folder}/{CONFIG_FILE}", adapter.config_json)
        manifest = AdapterManifest(
            name=draft.name,
            version=version,
            base=base,
            quantization=draft.quantization,
            chat_format=draft.chat_format,
            lora=adapter.lora,
            dataset=draft.dataset,
            config=draft.config,
            metrics=dict(draft.metrics),
            forced=forced_because is not None,
            forced_because=forced_because,
            evaluated_sha256=draft.evaluated_sha256,
            files={
                CONFIG_FILE: FileRef(
                    sha256=hashlib.sha256(adapter.config_json).hexdigest(), size=len(adapter.config_json)
                ),
                WEIGHTS_FILE: FileRef(sha256=copied, size=adapter.weights.stat().st_size),
            },
            created=datetime.now(UTC),
            run_name=draft.run_name,
            method=draft.method,
            parent=draft.parent,
            environment=draft.environment,
            samples=list(draft.samples),
        )
        self._storage.write(f"{folder}/{MANIFEST_FILE}", manifest.model_dump_json(indent=2).encode())
        return manifest

    def _claim(self, name: str) -> int:
        taken = (_NUMBERED.fullmatch(path) for path in self._storage.find(name))
        version = max((int(match[1]) for match in taken if match), default=0) + 1
        while not self._storage.create(_claim_path(name, version)):
            version += 1
        return version

    def _give_up(self, name: str, version: int) -> None:
        with suppress(Exception):
            if not self._storage.exists(f"{_folder(name, version)}/{MANIFEST_FILE}"):
                self._storage.remove_folder(_folder(name, version))
                self._storage.remove(_claim_path(name, version))

    def _sweep(self, name: str) -> None:
        paths = self._storage.find(name)
        published = {path.rpartition("/")[0] for path in paths if _PUBLISHED.fullmatch(path)}
        for path in paths:
            folder, _, file = path.rpartition("/")
            unpublished = folder.startswith(f"{name}/versions/") and folder not in published
            if unpublished or file.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):
                    if self._storage.age_s(path) > _STALE_S:
                        self._storage.remove(path)

    def _published(self, path: str = "") -> Iterator[tuple[str, int]]:
        with self._storage.guard("read it"):
            found = self._storage.find(path)
        for match in filter(None, map(_PUBLISHED.fullmatch, found)):
            if ADAPTER_NAME.fullmatch(match[1]):
                yield match[1], int(match[2])

    def _check_version(self, name: str, version: int) -> None:
        known = self.versions(name)
        if version not in known:
            raise AdapterNotFound(f"adapter {name!r} has no version {version}: it has {', '.join(map(str, known))}")

    @contextmanager
    def _changing(self, name: str, action: str) -> Iterator[None]:
        with self._storage.guard(action), self._storage.exclusive(f"{name}/.lock"):
            yield

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


def import_adapter(
    registry: AdapterRegistry,
    source_dir: Path,
    name: str,
    base: BaseModel,
    *,
    chat_format: str,
    force: bool = False,
    metrics: Mapping[str, float] | None = None,
    quantization: Quantization | None = None,
) -> AdapterManifest:
    """Register an adapter that was trained elsewhere (PEFT, TRL, Axolotl) for `base`.

    The base that its `adapter_config.json` names must be `base`: by source, path, or last component of either, so
    that another machine's folder of the same model passes; a file that names none is taken at the caller's word.
    Another base is refused with both names, and `force` does not help. Without `metrics` it needs `force`.

    Raises:
        AdapterRefused: as `AdapterRegistry.register` does.
    """
    draft = AdapterDraft(
        name=name,
        base=base,
        chat_format=chat_format,
        quantization=quantization or Quantization(),
        metrics=metrics or {},
    )
    return registry.register(source_dir, draft, force=force)


def _folder(name: str, version: int) -> str:
    return f"{name}/versions/{version:06d}"


def _claim_path(name: str, version: int) -> str:
    return f"{name}/claims/{version:06d}"


def _check_name(name: str, failure: type[RegistryError] = AdapterNotFound) -> None:
    if not ADAPTER_NAME.fullmatch(name):
        raise failure(
            f"adapter name {name!r:.80} is not accepted: use 1 to 63 of a-z 0-9 . _ -, the first a letter or digit"
        )


def _check_alias(alias: str) -> None:
    if not ADAPTER_NAME.fullmatch(alias) or alias.isdecimal():
        raise RegistryError(
            f"alias {alias!r:.80} is not accepted: use 1 to 63 of a-z 0-9 . _ -, the first a letter or digit, "
            "and not a number"
        )


def _choice(wanted: str, known: Sequence[str]) -> str:
    if near := difflib.get_close_matches(wanted, known, 1, 0.5):
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(known[:10])}" if known else "there is none yet"
