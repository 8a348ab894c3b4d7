"""A finished run's adapter becomes the next version in the registry, with where it came from.

`python -m training` and `training.sweep.run` call it. What a version must pass is the registry's to say.
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
    """Publish the adapter of a finished run as the next version of `config.adapter`; once, however often it is asked.

    Args:
        sweep: name, number of trials and searched keys of the sweep that the run was the best of.
    """
    registry = AdapterRegistry()
    if there := _version_of(registry, config.adapter, result):
        return there
    draft = AdapterDraft(
        name=config.adapter,
        base=result.inputs.base,
        chat_format=result.inputs.chat_format.name,
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
    """The version that this run's very weights became before."""
    if name not in registry.names():
        return None
    manifests = (registry.manifest(name, version) for version in registry.versions(name))
    of_run = [manifest for manifest in manifests if manifest.run_name == result.run_name]
    if not of_run:  # nearly always: the weights need not be read
        return None
    weights_sha256 = read_adapter(result.adapter_dir, result.inputs.base).weights_sha256
    return next((manifest for manifest in of_run if manifest.weights_sha256 == weights_sha256), None)
