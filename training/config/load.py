"""YAML and `key=value` overrides -> a checked configuration, and one line for whatever is wrong with them.

A message names the file or override, the key, its value, and the nearest key or what is accepted. Knows no particular
configuration: the pydantic model that a caller gives decides what is valid.
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
    """Read a `TrainConfig` from the YAML file `path`, with `overrides` such as `lora.r=8` applied to it.

    Raises:
        ConfigError: the file, a key or a value is not accepted; one line that names them.
    """
    return build_config(read_yaml(Path(path)), overrides, str(path))


def build_config(values: dict[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    """A `TrainConfig` of plain values, with `overrides` applied to them; `source` says in errors where they are from.

    Raises:
        ConfigError: a key or a value is not accepted.
    """
    return build_config_of(TrainConfig, values, overrides, source)


def build_config_of(model: type[_Config], values: dict[str, Any], overrides: Sequence[str], source: str) -> _Config:
    """As `build_config`, for a `model` that knows more keys."""
    overridden = {_apply_override(values, override) for override in overrides}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, overridden, model)) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 2e-4 as a number, which YAML 1.1 does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key {key!r} is given twice (line {line}): remove one of them")
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: it cannot be read or holds something else.
    """
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path"
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
        raise ConfigError(f"override {override!r} is not of the form key=value, such as lora.r=8")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(
            f"override {override!r} has a value that is not YAML: {' '.join(str(error).split())}"
        ) from None
    *sections, leaf = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r} goes into {section!r}, which is not a section but {target!r}")
    target[leaf] = value
    return key


def explain(error: ValidationError, source: str, overridden: set[str], model: type[BaseModel]) -> str:
    """One line on the first thing wrong: where, the key, its value, and the nearest key or what is accepted."""
    first, *others = error.errors(include_url=False)
    # Where a value may be of several types, the location ends in the name of the type that was tried.
    known = set(_dotted_keys(model))
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts)
    if first["type"] != "extra_forbidden":
        key = next((k for i in range(len(parts), 0, -1) if _without_positions(k := ".".join(parts[:i])) in known), key)
    where = "override" if any(f"{key}.".startswith(f"{k}.") for k in overridden) else source
    more = len({tuple(map(str, e["loc"]))[: key.count(".") + 1] for e in others} - {tuple(key.split("."))})
    also = f" (and {more} more)" if more else ""
    if first["type"] == "missing":
        return f"{where}: key '{key}' is missing: set it{also}"
    given = _short(first["input"])
    if first["type"] == "extra_forbidden":
        near = _nearest_key(key, known)
        hint = f"did you mean '{near}'?" if near else f"known keys here: {', '.join(_siblings(key, known))}"
        return f"{where}: unknown key '{key}' (value {given}): {hint}{also}"
    messages = [
        e["msg"].removeprefix("Value error, ") for e in (first, *others) if ".".join(map(str, e["loc"])).startswith(key)
    ]
    reason = " or ".join(dict.fromkeys(m[:1].lower() + m[1:] for m in messages))
    if not key:  # keys that do not go together
        return f"{source}: {reason}"
    return f"{where}: key '{key}' has value {given}: {reason}{also}"


def _nearest_key(key: str, known: set[str]) -> str | None:
    key = _without_positions(key)
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(leaf, siblings, n=1):
        return siblings[near[0]]
    leaves = {k.rpartition(".")[2]: k for k in sorted(known)}  # the right key in the wrong section
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[near[0]] if near else None


def _siblings(key: str, known: set[str]) -> list[str]:
    parent = _without_positions(key).rpartition(".")[0]
    return sorted(k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent)


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
    """`data.path.1.weight` is the key `data.path.weight` of the second entry."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def resolved(config: TrainConfig) -> Mapping[str, Any]:
    """The whole configuration as plain values, defaults included."""
    return config.model_dump(mode="json")
