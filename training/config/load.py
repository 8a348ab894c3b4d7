"""YAML and `key=value` overrides -> a validated configuration, or a one-line error.

The error names the file or override, the key, its value, and the closest known key or the accepted values. What is
valid is decided by the pydantic model alone.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from training.config.train_config import TrainConfig
from training.errors import ConfigError

_Config = TypeVar("_Config", bound=TrainConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a `TrainConfig` from the YAML file `path` and apply `overrides` such as `lora.r=8`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not accepted.
    """
    return build_config(read_yaml(Path(path)), overrides, str(path))


def build_config(values: dict[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    """A `TrainConfig` from plain values and `overrides`; errors name `source` as the origin of the values.

    Raises:
        ConfigError: a key or value is not accepted.
    """
    return build_config_of(TrainConfig, values, overrides, source)


def build_config_of(model: type[_Config], values: dict[str, Any], overrides: Sequence[str], source: str) -> _Config:
    """Like `build_config`, for a subclass of `TrainConfig` with more keys."""
    overridden = {_apply_override(values, override) for override in overrides}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, overridden, model)) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that rejects duplicate keys and reads 2e-4 as a number, which YAML 1.1 does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in keys:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"duplicate key {key!r} (line {line}): remove one of them")
            if isinstance(key, str | int | float | bool):
                keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = [file.name for file in path.parent.glob("*.yaml")]
        suggestions = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
        hint = f"did you mean {str(path.parent / suggestions[0])!r}?" if suggestions else "check the path"
        raise ConfigError(f"configuration {str(path)!r} does not exist: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `a.b=value` in `values`; returns the dotted key."""
    key, equals, text = override.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(f"override {override!r} is not of the form key=value: write for example lora.r=8")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {reason}") from None
    *sections, leaf = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section, its value is {target!r}")
    target[leaf] = value
    return key


def explain(error: ValidationError, source: str, overridden: set[str], model: type[BaseModel]) -> str:
    """One line about the first problem: the origin, the key, its value, and the closest key or the accepted values."""
    first, *others = error.errors(include_url=False)
    # Where a value may have several types, the location ends with the name of the type that was tried.
    known_keys = set(_dotted_keys(model))
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts)
    if first["type"] != "extra_forbidden":
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        key = next((prefix for prefix in prefixes if _without_positions(prefix) in known_keys), key)
    origin = "override" if any(f"{key}.".startswith(f"{k}.") for k in overridden) else source
    num_more = len({tuple(map(str, e["loc"]))[: key.count(".") + 1] for e in others} - {tuple(key.split("."))})
    more = f" (and {num_more} more)" if num_more else ""
    if first["type"] == "missing":
        return f"{origin}: key '{key}' is missing: set it{more}"
    value = _short(first["input"])
    if first["type"] == "extra_forbidden":
        suggestion = _closest_key(key, known_keys)
        siblings = ", ".join(_siblings(key, known_keys))
        hint = f"did you mean '{suggestion}'?" if suggestion else f"known keys here: {siblings}"
        return f"{origin}: unknown key '{key}' (value {value}): {hint}{more}"
    messages = [
        e["msg"].removeprefix("Value error, ") for e in (first, *others) if ".".join(map(str, e["loc"])).startswith(key)
    ]
    reason = " or ".join(dict.fromkeys(m[:1].lower() + m[1:] for m in messages))
    if not key:  # a conflict between keys
        return f"{source}: {reason}"
    return f"{origin}: key '{key}' has value {value}: {reason}{more}"


def _closest_key(key: str, known_keys: set[str]) -> str | None:
    key = _without_positions(key)
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known_keys if k.rpartition(".")[0] == parent}
    if matches := difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[matches[0]]
    leaves = {k.rpartition(".")[2]: k for k in sorted(known_keys)}  # the right key in the wrong section
    matches = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[matches[0]] if matches else None


def _siblings(key: str, known_keys: set[str]) -> list[str]:
    parent = _without_positions(key).rpartition(".")[0]
    return sorted(k.rpartition(".")[2] for k in known_keys if k.rpartition(".")[0] == parent)


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
        elif item := next((t for t in get_args(field.annotation) if _is_section(t)), None):  # list[DataSource]
            yield from _dotted_keys(item, f"{prefix}{name}.")


def _is_section(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _without_positions(key: str) -> str:
    """Drop list positions: `data.path.1.weight` becomes `data.path.weight`."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration that was recorded, maybe before a key existed whose default changes the run."""
    return {"chat": {"default_system": "none"}, **values}


def resolved(config: TrainConfig) -> Mapping[str, Any]:
    """The complete configuration as plain values, defaults included."""
    return config.model_dump(mode="json")
