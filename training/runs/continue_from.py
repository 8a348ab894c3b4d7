"""The registered adapter that a run goes on from (`continue_from`), and whether it knows what the run holds out.

The driver resolves it here and copies its files into the run's directory, which every worker sees; the registry may be
out of their reach. Called by `training.ray_train.fit`; what starts from the files is
`training.trainer.qlora.start_adapter`.
"""

from dataclasses import replace

from training.base_models.resolve import BaseCheckpoint
from training.config.train_config import LoraSettings, TrainConfig
from training.data.run_inputs import RunInputs
from training.errors import ConfigError
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from training.registry.manifest import AdapterManifest, DatasetRef, ParentRef, check_base
from training.registry.registry import AdapterRegistry
from training.runs.run_dir import RunDir

PARENT_DIR = "parent"  # in the run's directory
# Beside the files, what decides which rows are held out.
_SPLIT_KEYS = (
    "split_seed", "deduplicate", "max_rows", "format", "columns", "name", "split", "revision", "on_bad_row",
    "on_too_long",
)  # fmt: skip


def resolve_parent_adapter(
    config: TrainConfig, base: BaseCheckpoint, registry: AdapterRegistry | None = None
) -> tuple[TrainConfig, AdapterManifest | None]:
    """The configuration with the parent's exact version, LoRA shape and chat format written out, and the parent.

    A run without `continue_from` gets its configuration back and None.

    Raises:
        AdapterNotFound: there is no such adapter, version or alias.
        AdapterRefused: it was trained on another base.
        ConfigError: `lora`, `chat_format` or `quantization` contradicts the parent; naming both.
    """
    if config.continue_from is None:
        return config, None
    name, _, ref = config.continue_from.partition("@")
    parent = (registry or AdapterRegistry()).resolve(name, ref or None)
    check_base(parent, base)
    shape = parent.lora
    given = config.lora.model_dump() | {"target_modules": sorted(config.lora.targets)}
    _agree(parent, "lora", given, shape.model_dump(), config.lora.model_fields_set)
    if config.chat_format != "auto":
        _agree(parent, "", {"chat_format": config.chat_format}, {"chat_format": parent.chat_format}, {"chat_format"})
    _agree(
        parent,
        "quantization",
        config.quantization.model_dump(),
        parent.quantization.model_dump(exclude={"compute_dtype"}),
        {"quant_type", "double_quant"},
    )
    lora = LoraSettings.model_validate(shape.model_dump() | {"lora_dropout": config.lora.lora_dropout})
    pinned = {"continue_from": f"{parent.name}@{parent.version}", "lora": lora, "chat_format": parent.chat_format}
    return config.model_copy(update=pinned), parent


def copy_parent(parent: AdapterManifest, run_dir: RunDir, registry: AdapterRegistry | None = None) -> None:
    """Put the parent's checked files into the run's directory.

    Raises:
        AdapterRefused: a file is missing or changed.
        StorageError: the run's directory cannot be written.
    """
    source = (registry or AdapterRegistry()).fetch(parent)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        run_dir.upload(source / name, f"{PARENT_DIR}/{name}")


def parent_ref(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> ParentRef:
    """What the registry records of the parent of a run with this configuration and dataset."""
    other = _other_split(config, dataset, parent)
    return ParentRef(name=parent.name, version=parent.version, weights_sha256=parent.weights_sha256, other_split=other)


def with_warning(inputs: RunInputs, config: TrainConfig, parent: AdapterManifest | None) -> RunInputs:
    """`inputs` whose report warns where the parent may have been trained on rows that are held out now."""
    if parent is None or (warning := split_warning(config, inputs.dataset, parent)) is None:
        return inputs
    return replace(inputs, report=inputs.report.model_copy(update={"warnings": [*inputs.report.warnings, warning]}))


def split_warning(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> str | None:
    """One line where the parent may have been trained on rows that a run with this dataset holds out."""
    other = _other_split(config, dataset, parent)
    return other and (
        f"{parent.name}@{parent.version}, from which training goes on, may have been trained on rows that are held out "
        f"now: {other}; held-out losses may look better than they are"
    )


def _other_split(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> str | None:
    """How the parent's split differs so that it may have seen held-out rows; None where it cannot have, or none are."""
    if not dataset.num_held_out:
        return None
    if parent.dataset is None or parent.config is None:
        return "what it was trained on is not recorded"
    if parent.dataset.sha256 != dataset.sha256:
        return f"its data has sha256 {parent.dataset.sha256[:12]} and not {dataset.sha256[:12]}"
    given, theirs = config.data.model_dump(mode="json"), parent.config.get("data", {})
    if bool(theirs.get("held_out_path")) != bool(config.data.held_out_path):
        return "only one of both runs has data.held_out_path"
    if config.data.held_out_path:
        return None
    differing = [
        f"its data.{key} is {theirs.get(key)!r}, not {given[key]!r}"
        for key in _SPLIT_KEYS
        if theirs.get(key) != given[key]
    ]
    if parent.config.get("max_length") != config.max_length:
        differing.append(f"its max_length is {parent.config.get('max_length')}, not {config.max_length}")
    if parent.dataset.num_held_out < dataset.num_held_out:
        differing.append(f"it held out {parent.dataset.num_held_out:,} rows, not {dataset.num_held_out:,}")
    return differing[0] if differing else None


def _agree(
    parent: AdapterManifest, section: str, given: dict[str, object], theirs: dict[str, object], keys: set[str]
) -> None:
    for key in sorted(keys & theirs.keys()):
        if given[key] != theirs[key]:
            dotted = f"{section}.{key}".lstrip(".")
            raise ConfigError(
                f"{dotted} is {given[key]!r}, but continue_from {parent.name}@{parent.version} has {theirs[key]!r}: "
                f"leave {dotted} out, or train a new adapter without continue_from"
            )
