"""The registered adapter that a run continues from (`continue_from`): its parent.

Resolves the parent, copies its files into the run's directory, and warns if it may have been trained on rows that the
run holds out. The files are copied because workers see that directory but may have no access to the registry.
"""

from dataclasses import replace

from training.base_models.resolve import BaseCheckpoint
from training.chat.default_system import ChatSettings
from training.chat.detect import configured_default_system, default_system_setting
from training.config.train_config import LoraSettings, TrainConfig
from training.data.run_inputs import RunInputs
from training.errors import ConfigError
from training.registry.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from training.registry.manifest import AdapterManifest, DatasetRef, ParentRef, check_base
from training.registry.registry import AdapterRegistry
from training.runs.run_dir import RunDir

PARENT_DIR = "parent"  # in the run's directory
# The keys of `data` that decide, besides the data files, which rows are held out.
_SPLIT_KEYS = (
    "split_seed", "deduplicate", "max_rows", "format", "columns", "name", "split", "revision", "on_bad_row",
    "on_too_long",
)  # fmt: skip


def resolve_parent_adapter(
    config: TrainConfig, base: BaseCheckpoint, registry: AdapterRegistry | None = None
) -> tuple[TrainConfig, AdapterManifest | None]:
    """The configuration with the parent's exact version, LoRA parameters and chat filled in, and the parent.

    Without `continue_from`, the configuration is unchanged and the parent is None.

    Raises:
        AdapterNotFound: the adapter, version or alias does not exist.
        AdapterRefused: it was trained on another base.
        ConfigError: `lora`, `chat_format`, `chat` or `quantization` contradicts the parent.
    """
    if config.continue_from is None:
        return config, None
    name, _, ref = config.continue_from.partition("@")
    parent = (registry or AdapterRegistry()).resolve(name, ref or None)
    check_base(parent, base)
    lora_params = parent.lora.model_dump()
    configured = config.lora.model_dump() | {"target_modules": sorted(config.lora.targets)}
    _check_agreement(parent, "lora", configured, lora_params, config.lora.model_fields_set)
    if config.chat_format != "auto":
        _check_agreement(
            parent, "", {"chat_format": config.chat_format}, {"chat_format": parent.chat_format}, {"chat_format"}
        )
    chat = _chat_of_parent(parent, config.chat, base)
    _check_agreement(
        parent,
        "quantization",
        config.quantization.model_dump(),
        parent.quantization.model_dump(exclude={"compute_dtype"}),
        {"quant_type", "double_quant"},
    )
    lora = LoraSettings.model_validate(lora_params | {"lora_dropout": config.lora.lora_dropout})
    pinned = {
        "continue_from": f"{parent.name}@{parent.version}",
        "lora": lora,
        "chat_format": parent.chat_format,
        "chat": chat,
    }
    return config.model_copy(update=pinned), parent


def copy_parent(parent: AdapterManifest, run_dir: RunDir, registry: AdapterRegistry | None = None) -> None:
    """Verify the parent's files and copy them into the run's directory.

    Raises:
        AdapterRefused: a file is missing or changed.
        TrainingError: the run's directory cannot be written.
    """
    source = (registry or AdapterRegistry()).fetch(parent)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        run_dir.upload(source / name, f"{PARENT_DIR}/{name}")


def parent_ref(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> ParentRef:
    """What the registry records about the parent of a run with this configuration and dataset."""
    other = _other_split(config, dataset, parent)
    return ParentRef(name=parent.name, version=parent.version, weights_sha256=parent.weights_sha256, other_split=other)


def with_warning(inputs: RunInputs, config: TrainConfig, parent: AdapterManifest | None) -> RunInputs:
    """`inputs`, with a warning in the report if the parent may have been trained on rows that are now held out."""
    if parent is None or (warning := split_warning(config, inputs.dataset, parent)) is None:
        return inputs
    return replace(inputs, report=inputs.report.model_copy(update={"warnings": [*inputs.report.warnings, warning]}))


def split_warning(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> str | None:
    """A one-line warning if the parent may have been trained on rows that this run holds out; else None."""
    other = _other_split(config, dataset, parent)
    return other and (
        f"{parent.name}@{parent.version}, from which training continues, may have been trained on rows that are now "
        f"held out: {other}; held-out losses may look better than they are"
    )


def _chat_of_parent(parent: AdapterManifest, chat: ChatSettings, base: BaseCheckpoint) -> ChatSettings:
    theirs = default_system_setting(parent.default_system, parent.chat_format, base)
    if theirs is None:
        raise ConfigError(
            f"{parent.name}@{parent.version} was trained with a system text that the chat template in {base.path} does "
            "not have any more: put the template back, or train a new adapter without continue_from"
        )
    configured = configured_default_system(chat.default_system, parent.chat_format, base)
    ours = default_system_setting(configured, parent.chat_format, base)
    _check_agreement(parent, "chat", {"default_system": ours}, {"default_system": theirs}, chat.model_fields_set)
    return ChatSettings(default_system=theirs)


def _other_split(config: TrainConfig, dataset: DatasetRef, parent: AdapterManifest) -> str | None:
    """How the parent's split differs, so that it may have seen held-out rows; None if it cannot have seen any."""
    if not dataset.num_held_out:
        return None
    if parent.dataset is None or parent.config is None:
        return "its training data is not recorded"
    if parent.dataset.sha256 != dataset.sha256:
        return f"its data has sha256 {parent.dataset.sha256[:12]}, not {dataset.sha256[:12]}"
    ours, theirs = config.data.model_dump(mode="json"), parent.config.get("data", {})
    if bool(theirs.get("held_out_path")) != bool(config.data.held_out_path):
        return "only one of the two runs has data.held_out_path"
    if config.data.held_out_path:
        return None
    differing = [
        f"its data.{key} is {theirs.get(key)!r}, not {ours[key]!r}"
        for key in _SPLIT_KEYS
        if theirs.get(key) != ours[key]
    ]
    if parent.config.get("max_length") != config.max_length:
        differing.append(f"its max_length is {parent.config.get('max_length')}, not {config.max_length}")
    if parent.dataset.num_held_out < dataset.num_held_out:
        differing.append(f"it held out {parent.dataset.num_held_out:,} rows, not {dataset.num_held_out:,}")
    return differing[0] if differing else None


def _check_agreement(
    parent: AdapterManifest, section: str, ours: dict[str, object], theirs: dict[str, object], keys: set[str]
) -> None:
    for key in sorted(keys & theirs.keys()):
        if ours[key] != theirs[key]:
            dotted = f"{section}.{key}".lstrip(".")
            raise ConfigError(
                f"{dotted} is {ours[key]!r}, but continue_from {parent.name}@{parent.version} has {theirs[key]!r}: "
                f"leave {dotted} out, or train a new adapter without continue_from"
            )
