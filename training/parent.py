"""The registered adapter that a run goes on from (`continue_from`).

The driver resolves it here and copies its files into the run's directory, which every worker sees; the registry may be
out of their reach. Called by `training.fit`; what starts from the files is `training.qlora.start_adapter`.
"""

from training.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from training.base_models import BaseModel
from training.config import LoraSettings, TrainConfig
from training.errors import ConfigError
from training.registry import AdapterManifest, AdapterRegistry, check_base
from training.run_dir import RunDir

PARENT_DIR = "parent"  # in the run's directory


def resolve_parent(
    config: TrainConfig, base: BaseModel, registry: AdapterRegistry | None = None
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
