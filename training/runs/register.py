"""Registers a finished run's adapter as the next version, with its provenance.

Does not know what a version must pass; the registry decides that.
"""

from collections.abc import Mapping
from typing import Any

from training.config.load import resolved
from training.config.train_config import TrainConfig
from training.registry.adapter_files import read_adapter
from training.registry.audit import audited, os_user
from training.registry.manifest import AdapterManifest, SampleAnswer
from training.registry.publish import AdapterDraft, AdapterPublisher
from training.registry.registry import AdapterRegistry
from training.runs.continue_from import parent_ref
from training.runs.result import RunResult


def register(
    config: TrainConfig, result: RunResult, *, force: bool = False, sweep: Mapping[str, Any] | None = None
) -> AdapterManifest:
    """Publish the adapter of a finished run as the next version of `config.adapter`. Idempotent.

    Args:
        force: publish an adapter that the gate rejects; the manifest records it.
        sweep: name, number of trials and searched keys of the sweep whose best trial this run is.

    Raises:
        AdapterRefused: the gate or another check rejects the adapter.
    """
    registry = AdapterRegistry()
    if existing := _version_of(registry, config.adapter, result):
        return existing
    draft = AdapterDraft(
        name=config.adapter,
        base=result.inputs.base,
        chat_format=result.inputs.chat_format.name,
        default_system=result.inputs.chat_format.default_system,
        quantization=result.quantization,
        metrics=result.metrics,
        dataset=result.inputs.dataset,
        config={**resolved(result.config), **({"sweep": dict(sweep)} if sweep else {})},
        run_name=result.run_name,
        evaluated_sha256=result.adapter_sha256,
        changes=result.changes,
        method=config.method,
        parent=parent_ref(result.config, result.inputs.dataset, result.parent) if result.parent else None,
        environment=result.environment,
        samples=[SampleAnswer.model_validate(sample) for sample in result.samples],
    )
    with audited(os_user(), "register", config.adapter, run_name=result.run_name) as record:
        manifest = AdapterPublisher(registry).register(
            result.adapter_dir, draft, force=force, min_improvement=config.gate.min_improvement
        )
        record |= {"version": manifest.version, "forced": manifest.forced}
    return manifest


def _version_of(registry: AdapterRegistry, name: str, result: RunResult) -> AdapterManifest | None:
    """The version that already has exactly this run's weights."""
    if name not in registry.names():
        return None
    manifests = (registry.manifest(name, version) for version in registry.versions(name))
    from_run = [manifest for manifest in manifests if manifest.run_name == result.run_name]
    if not from_run:  # the usual case; saves reading the weights
        return None
    weights_sha256 = read_adapter(result.adapter_dir, result.inputs.base).weights_sha256
    return next((manifest for manifest in from_run if manifest.weights_sha256 == weights_sha256), None)
