"""Which linear layers of a Llama an adapter's configuration selects, with which rank and alpha: decided as in PEFT.

PEFT selects modules by full name, suffix or pattern, and changes rank and alpha by pattern. Here only the result
counts: whole kinds of linear layers, with one rank and one alpha. Patterns come from untrusted files, so a process of
their own matches them, and has a few seconds for it.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.base_models.llama_shape import LLAMA_LINEARS, LlamaLinear, module_path
from training.registry.adapter_config import AdapterConfig
from training.registry.safetensors_header import refuse, shortened

_DEFAULT = ("q_proj", "v_proj")  # PEFT's for a Llama
_ACCEPTED = ", ".join(sorted(LLAMA_LINEARS))
_MATCHING_S = 10.0  # far more than a busy machine needs to start Python
_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[getattr(re, how)(pattern, name) is not None for name in names] for how, pattern in patterns], sys.stdout)
"""

_Pattern = tuple[str, str]  # the function of `re` that PEFT calls, and its first argument
_Matches = Mapping[_Pattern, frozenset[str]]  # the modules that each pattern matches


@dataclass(frozen=True, slots=True)
class Targets:
    """The linear layers that are adapted in every block, with their rank and alpha."""

    linears: list[LlamaLinear]
    r: int
    lora_alpha: float


def resolve_targets(path: Path, config: AdapterConfig, num_layers: int) -> Targets:
    """What `config`, read from `path`, adapts in a Llama of `num_layers`.

    Raises:
        AdapterRefused: it selects a module that is no linear layer of a block, or a linear layer in some blocks only,
            or gives layers different ranks or alphas.
    """
    linears = {
        f"model.layers.{layer}.{module_path(linear)}": linear for layer in range(num_layers) for linear in LLAMA_LINEARS
    }
    modules = [*linears, *_other_modules(num_layers)]
    target = list(_DEFAULT) if config.target_modules is None else config.target_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        target = list(LLAMA_LINEARS)
    patterns = [_module_pattern(names) for names in (target, config.exclude_modules) if isinstance(names, str)]
    patterns += [_value_pattern(key) for key in {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}]
    matches = _match(path, patterns, modules) if patterns else {}

    excluded = set(_select(config.exclude_modules or [], modules, matches))
    selected = [name for name in _select(target, modules, matches) if name not in excluded]
    _check_selected(path, config, selected, linears, num_layers)
    r = _one_value(path, "rank_pattern", config.rank_pattern, config.r, selected, matches)
    lora_alpha = _one_value(path, "alpha_pattern", config.alpha_pattern, config.lora_alpha, selected, matches)
    kinds = {linears[name] for name in selected}
    return Targets([linear for linear in LLAMA_LINEARS if linear in kinds], int(r), lora_alpha)


def _other_modules(num_layers: int) -> list[str]:
    """The modules of transformers' LlamaForCausalLM that are no linear layers of a block."""
    inner = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
    blocks = [f"model.layers.{layer}{name}" for layer in range(num_layers) for name in inner]
    return ["model", "model.embed_tokens", "model.layers", *blocks, "model.norm", "model.rotary_emb", "lm_head"]


def _module_pattern(pattern: str) -> _Pattern:
    return "fullmatch", pattern


def _value_pattern(key: str) -> _Pattern:
    return "match", rf"(.*\.)?({key})$"


def _match(path: Path, patterns: Sequence[_Pattern], modules: Sequence[str]) -> _Matches:
    """The modules that each pattern matches."""
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    question = json.dumps([patterns, modules])
    try:
        answer = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_MATCHING_S)
    except subprocess.TimeoutExpired:
        refuse(path, f"has a pattern that takes more than {_MATCHING_S:.0f} s to match: give a list of {_ACCEPTED}")
    if answer.returncode != 0:
        reason = shortened(answer.stderr.strip().rpartition("\n")[2])
        refuse(path, f"has a pattern that is no regular expression: {reason}; give a list of {_ACCEPTED}")
    matched = [
        frozenset(name for name, hit in zip(modules, row, strict=True) if hit) for row in json.loads(answer.stdout)
    ]
    return dict(zip(patterns, matched, strict=True))


def _select(names: list[str] | str, modules: Sequence[str], matches: _Matches) -> list[str]:
    if isinstance(names, str):
        return [module for module in modules if module in matches[_module_pattern(names)]]
    given = set(names)
    return [module for module in modules if not given.isdisjoint(_suffixes(module))]


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _check_selected(
    path: Path, config: AdapterConfig, selected: list[str], linears: Mapping[str, LlamaLinear], num_layers: int
) -> None:
    given = f"target_modules {shortened(config.target_modules)}"
    if config.exclude_modules:
        given += f" without exclude_modules {shortened(config.exclude_modules)}"
    if not selected:
        refuse(path, f"selects no linear layer of this base by {given}: name some of {_ACCEPTED}")
    if others := [name for name in selected if name not in linears]:
        refuse(path, f"selects {others[-1]!r} by {given}: only {_ACCEPTED} can be adapted")
    counts = Counter(linears[name] for name in selected)
    if missing := next((name for name, linear in linears.items() if counts[linear] > 0 and name not in selected), None):
        count = counts[linears[missing]]
        refuse(
            path,
            f"selects {linears[missing]} in {count} of {num_layers} layers, and not {missing!r}, by {given}: "
            "adapt a linear layer everywhere or nowhere",
        )
    layers = config.layers_to_transform
    chosen = {layers} if isinstance(layers, int) else set(layers or range(num_layers))
    if not chosen.issuperset(range(num_layers)):
        refuse(
            path,
            f"key 'layers_to_transform' is {shortened(layers)}: adapt all {num_layers} layers, or train without it",
        )


def _one_value(
    path: Path,
    key: str,
    pattern_values: Mapping[str, float] | None,
    default: float,
    selected: list[str],
    matches: _Matches,
) -> float:
    """The rank or alpha of all selected modules: of each the first pattern that matches it, else the default."""
    if not pattern_values:
        return default
    values = {}
    for name in selected:
        matching = (value for pattern, value in pattern_values.items() if name in matches[_value_pattern(pattern)])
        values[name] = next(matching, default)
    first = values[selected[0]]
    if other := next((name for name in selected if values[name] != first), None):
        refuse(
            path,
            f"key {key!r} gives {selected[0]} {first} and {other} {values[other]}: "
            "only one value for all layers is supported, train without it",
        )
    return first
