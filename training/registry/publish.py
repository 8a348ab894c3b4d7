"""Publishes adapters as versions of the registry; `import_adapter` takes adapters from other trainers.

A writer claims the next number, copies the files and writes the manifest last, so a version is complete or does not
exist, even if the writer is killed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.base_models.nf4 import Quantization
from training.base_models.resolve import BaseCheckpoint
from training.chat.default_system import DefaultSystem
from training.errors import AdapterRefused, RegistryError
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter
from training.registry.gate import check_evaluated, rejection_reason
from training.registry.layout import NUMBERED, PUBLISHED, check_name, claim_path, version_folder
from training.registry.manifest import (
    MANIFEST_FILE,
    AdapterManifest,
    BaseRef,
    DatasetRef,
    Environment,
    FileRef,
    Method,
    ParentRef,
    SampleAnswer,
)
from training.registry.registry import AdapterRegistry
from training.storage import TEMPORARY_PREFIX

_STALE_S = 24 * 3600  # after which the leftovers of a dead writer are removed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDraft:
    """What the caller of `register` provides; the rest of the manifest is read from the files.

    Attributes:
        base: the base that the adapter was trained on; its hash and shapes are read from its files.
        chat_format: the resolved name, never `auto`.
        default_system: what was added to the system text of every dialog.
        metrics: should have `eval_loss` and `base_eval_loss`, the held-out loss with and without the adapter.
        config: the resolved training configuration, JSON values only.
        evaluated_sha256: hash of the weights file that `metrics` were computed with; None if unknown.
        changes: whether any output differed from the base's in the evaluation; None if this was not checked.
        parent: the version that training continued from.
        environment: code, libraries and devices of the run.
        samples: held-out prompts, answered by base and adapter.
    """

    name: str
    base: BaseCheckpoint
    chat_format: str
    default_system: DefaultSystem | None = None
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


class AdapterPublisher:
    """Publishes versions to the registry that `registry` reads; the first version creates its directory."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._storage = registry.storage

    def register(
        self, source_dir: Path, draft: AdapterDraft, *, force: bool = False, min_improvement: float = 0.0
    ) -> AdapterManifest:
        """Check the PEFT adapter in `source_dir` and publish it as the next version of `draft.name`.

        The adapter must change some output, and its held-out loss must be at least `min_improvement` (nats) below the
        base's and not above its parent's. `force` overrides these three conditions and no other check; the manifest
        then records `forced` and the reason.

        Raises:
            AdapterRefused: the files are not a plain LoRA adapter of this base, it is no better than the base or
                worse than its parent, or the weights are not those that were evaluated.
        """
        check_name(draft.name, RegistryError)
        if draft.chat_format == "auto":
            raise RegistryError("chat format 'auto' cannot be recorded: give the resolved name")
        adapter = read_adapter(source_dir, draft.base)
        check_evaluated(draft.evaluated_sha256, adapter.weights_sha256)
        reason = rejection_reason(
            draft.metrics, min_improvement, changes=adapter.changes and draft.changes is not False
        )
        if reason and not force:
            raise AdapterRefused(f"adapter {draft.name!r} is not registered: {reason}, or force it")
        base = draft.base
        with self._storage.guard(f"register {draft.name!r}"):
            base_ref = BaseRef(
                name=base.name, source=base.source, revision=base.revision, weights_sha256=base.weights_sha256()
            )
            self._remove_leftovers(draft.name)
            version = self._claim(draft.name)
            try:
                return self._publish(draft, base_ref, version, adapter, forced_because=reason)
            except BaseException:
                self._abandon(draft.name, version)
                raise

    def _publish(
        self, draft: AdapterDraft, base: BaseRef, version: int, adapter: AdapterFiles, *, forced_because: str | None
    ) -> AdapterManifest:
        folder = version_folder(draft.name, version)
        copied_sha256 = self._storage.upload(adapter.weights, f"{folder}/{WEIGHTS_FILE}")
        if copied_sha256 != adapter.weights_sha256:
            raise AdapterRefused(
                f"{adapter.weights} changed during registration: register it again when it is complete"
            )
        self._storage.write(f"{folder}/{CONFIG_FILE}", adapter.config_json)
        manifest = AdapterManifest(
            name=draft.name,
            version=version,
            base=base,
            quantization=draft.quantization,
            chat_format=draft.chat_format,
            default_system=draft.default_system,
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
                WEIGHTS_FILE: FileRef(sha256=copied_sha256, size=adapter.weights.stat().st_size),
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
        """Claim the next free version number."""
        matches = (NUMBERED.fullmatch(path) for path in self._storage.find(name))
        version = max((int(match[1]) for match in matches if match), default=0) + 1
        while not self._storage.create(claim_path(name, version)):
            version += 1
        return version

    def _abandon(self, name: str, version: int) -> None:
        """Remove an unpublished version's files and its claim."""
        with suppress(Exception):
            if not self._storage.exists(f"{version_folder(name, version)}/{MANIFEST_FILE}"):
                self._storage.remove_folder(version_folder(name, version))
                self._storage.remove(claim_path(name, version))

    def _remove_leftovers(self, name: str) -> None:
        """Remove what dead writers left: temporary files, and files of versions without a manifest."""
        paths = self._storage.find(name)
        published = {path.rpartition("/")[0] for path in paths if PUBLISHED.fullmatch(path)}
        for path in paths:
            folder, _, file = path.rpartition("/")
            unpublished = folder.startswith(f"{name}/versions/") and folder not in published
            if unpublished or file.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):
                    if self._storage.age_s(path) > _STALE_S:
                        self._storage.remove(path)


def import_adapter(
    registry: AdapterRegistry,
    source_dir: Path,
    name: str,
    base: BaseCheckpoint,
    *,
    chat_format: str,
    default_system: DefaultSystem | None = None,
    force: bool = False,
    metrics: Mapping[str, float] | None = None,
    quantization: Quantization | None = None,
) -> AdapterManifest:
    """Register an adapter that was trained elsewhere (PEFT, TRL, Axolotl) for `base`.

    The base that its `adapter_config.json` names must match `base` by source, path, or the last component of either, so
    that a folder of the same model on another machine passes, and so does a snapshot in a hub cache; if it names none,
    `base` is assumed. Another base is refused even with `force`. Without `metrics`, `force` is required.

    Raises:
        AdapterRefused: as `AdapterPublisher.register` does.
    """
    draft = AdapterDraft(
        name=name,
        base=base,
        chat_format=chat_format,
        default_system=default_system,
        quantization=quantization or Quantization(),
        metrics=metrics or {},
    )
    return AdapterPublisher(registry).register(source_dir, draft, force=force)
