"""Terminal reports on adapter versions: one version with its lineage, the diff of two, a verification.

Formatting only: knows neither registries nor JSON.
"""

from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from clients.verify import Comparison
    from training.registry.diff import FieldChange, WeightChange, WeightsDiff
    from training.registry.manifest import AdapterManifest

_TOP_MODULES = 8
_WIDTH = 160  # if the output is not a terminal


def print_report(report: RenderableType) -> None:
    """Print to stdout, as wide as the terminal."""
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(width=_WIDTH, highlight=False)
    console.print(report)


def show_report(
    manifest: "AdapterManifest", aliases: Sequence[str], ancestors: Sequence["AdapterManifest"]
) -> RenderableType:
    """One version: its facts and metrics, lineage, sample answers and configuration."""
    title = Text(manifest.model_id, style="bold")
    if aliases:
        title.append(f"  {', '.join(aliases)}", style="green")
    parts: list[RenderableType] = [title, _facts(manifest), _lineage(manifest, ancestors)]
    for sample in manifest.samples:
        answers = _key_value_table({"prompt": sample.prompt, "dataset": sample.reference, "base": sample.base})
        answers.add_row("adapter", Text(sample.adapter, style="bold"))
        parts.append(answers)
    if manifest.config is not None:
        parts += [Text("config", style="bold"), _yaml(manifest.config)]
    spaced_parts: list[RenderableType] = []
    for part in parts:
        spaced_parts += [part, Text()]
    return Group(*spaced_parts[:-1])


def diff_report(
    a: "AdapterManifest", b: "AdapterManifest", changes: Sequence["FieldChange"], weights: "WeightsDiff | None"
) -> RenderableType:
    """Fields and weights in which `b` differs from `a`; `weights` is None if the bases differ."""
    from training.registry.diff import to_text

    parts: list[RenderableType] = []
    if changes:
        table = Table("", a.model_id, b.model_id, box=SIMPLE_HEAD, pad_edge=False)
        for change in changes:
            table.add_row(change.key, to_text(change.a), to_text(change.b))
        parts.append(table)
    else:
        parts.append(Text(f"the manifests of {a.model_id} and {b.model_id} are identical"))
    if weights is None:
        parts.append(Text("weights are not compared: the two were trained on different bases"))
    elif weights.overall.relative_change == 0:
        parts.append(Text("the weights are equal"))
    else:
        table = Table("weights", "relative change", "cosine", box=SIMPLE_HEAD, pad_edge=False)
        for module in (weights.overall, *weights.modules[:_TOP_MODULES]):
            table.add_row(*_weight_cells(module, len(weights.modules)))
        if len(weights.modules) > _TOP_MODULES:
            table.add_row(f"{len(weights.modules) - _TOP_MODULES} others changed less", "", "")
        parts.append(table)
    return Group(*parts)


def verify_report(manifest: "AdapterManifest", comparisons: Sequence["Comparison"]) -> RenderableType:
    """Each prompt, and whether PEFT and the engine agree."""
    table = Table("prompt", "answer", "tokens", "greedy", "log-probability", "", box=SIMPLE_HEAD, pad_edge=False)
    for comparison in comparisons:
        table.add_row(
            _shorten(comparison.prompt),
            _shorten(comparison.answer),
            str(comparison.num_tokens),
            "equal" if comparison.same_tokens else "differ",
            f"{comparison.max_difference:.1e} apart",
            Text("ok", style="green") if comparison.passed else Text("differs", style="bold red"),
        )
    failed = sum(not comparison.passed for comparison in comparisons)
    if failed:
        summary = f"PEFT and the engine disagree on {failed} of {len(comparisons)} prompts"
    else:
        summary = (
            f"{manifest.model_id} is intact, loads with AutoPeftModelForCausalLM, and the engine's answers match PEFT's"
        )
    return Group(table, Text(summary, style="bold red" if failed else "green"))


def _facts(manifest: "AdapterManifest") -> Table:
    metrics, lora = manifest.metrics, manifest.lora
    facts = {"created": f"{manifest.created:%Y-%m-%d %H:%M} UTC" + _format_if(manifest.run_name, " by run {}")}
    training: list[str] = [manifest.method or ""]
    if "num_steps" in metrics:
        training.append(f"{metrics['num_steps']:.0f} steps")
    if "num_train_tokens" in metrics:
        training.append(f"{metrics['num_train_tokens']:,.0f} tokens")
    if "train_s" in metrics:
        minutes, seconds = divmod(round(metrics["train_s"]), 60)
        training.append(f"{minutes}:{seconds:02d} min")
    if manifest.config is not None and "seed" in manifest.config:
        training.append(f"seed {manifest.config['seed']}")
    facts["training"] = ", ".join(filter(None, training)) or "not recorded"
    if "eval_loss" in metrics and "base_eval_loss" in metrics:
        baseline = ", the reference's" if _is_preference(manifest) else " nats, the base's"
        facts[_loss_name(manifest)] = (
            f"{metrics['eval_loss']:.4f}{baseline} {metrics['base_eval_loss']:.4f}"
            + (f", over {metrics['eval_tokens']:,.0f} tokens" if "eval_tokens" in metrics else "")
            + (", computed from the published file" if manifest.evaluated_sha256 else "")
        )
    if manifest.forced:
        facts["forced"] = manifest.forced_because or "yes"
    if manifest.dataset is not None:
        data = manifest.dataset
        facts["dataset"] = (
            f"{', '.join(data.sources)}: {data.num_rows} rows, {data.num_held_out} of them held out, "
            f"sha256 {data.sha256[:12]}"
        )
    scaling = "rank-stabilised, " if lora.use_rslora else ""
    facts["lora"] = f"r {lora.r}, alpha {lora.lora_alpha}, {scaling}{', '.join(lora.target_modules)}"
    quantization = manifest.quantization
    facts["base weights"] = (
        f"{quantization.quant_type}{', double quantization' if quantization.double_quant else ''}, "
        f"computed in {quantization.compute_dtype}"
    )
    facts["chat format"] = manifest.chat_format
    if added := manifest.default_system:
        facts["default system"] = " ".join(f"{added.prefix}{added.text}".split())
    if environment := manifest.environment:
        version = environment.code_version or "not installed"
        facts["code"] = version + _format_if(environment.git_commit, ", commit {}")
        facts["libraries"] = ", ".join(f"{name} {version}" for name, version in environment.libraries.items())
        facts["hardware"] = ", ".join(
            f"{environment.devices.count(device)} x {device}" for device in dict.fromkeys(environment.devices)
        )
    facts["weights"] = f"sha256 {manifest.weights_sha256}, {manifest.files['adapter_model.safetensors'].size:,} bytes"
    return _key_value_table(facts)


def _lineage(manifest: "AdapterManifest", ancestors: Sequence["AdapterManifest"]) -> Tree:
    """The lineage from the base down to this version."""
    base = manifest.base
    tree = Tree(Text(f"{base.source}{_format_if(base.revision, ' at {}')}, weights sha256 {base.weights_sha256[:12]}"))
    node = tree
    oldest = ancestors[-1] if ancestors else manifest
    if oldest.parent is not None:
        label = f"{oldest.parent}: deleted or replaced since, weights sha256 {oldest.parent.weights_sha256[:12]}"
        node = node.add(Text(label, style="yellow"))
    for version in (*reversed(ancestors), manifest):
        title = Text(f"{version.name}@{version.version}", style="bold" if version is manifest else "")
        title.append(f"  {', '.join(filter(None, [version.method or '', _loss(version), _sources(version)]))}")
        if version.parent and version.parent.other_split:
            warning = f"{version.parent} may have been trained on this version's held-out rows"
            title.append(f"\n{warning}: {version.parent.other_split}", style="yellow")
        node = node.add(title)
    return tree


def _loss(manifest: "AdapterManifest") -> str:
    return f"{_loss_name(manifest)} {manifest.metrics['eval_loss']:.4f}" if "eval_loss" in manifest.metrics else ""


def _loss_name(manifest: "AdapterManifest") -> str:
    """Named by its method for preferences, whose losses are not comparable with a cross entropy."""
    if manifest.method and _is_preference(manifest):
        return f"held-out {manifest.method.upper()} loss"
    return "held-out loss"


def _is_preference(manifest: "AdapterManifest") -> bool:
    return manifest.method in ("dpo", "kto")


def _sources(manifest: "AdapterManifest") -> str:
    return f"on {', '.join(manifest.dataset.sources)}" if manifest.dataset else ""


def _weight_cells(change: "WeightChange", num_modules: int) -> tuple[str, str, str]:
    module = f"all {num_modules} modules" if change.module == "all" else change.module
    relative = "from zero" if change.relative_change is None else f"{change.relative_change:.2%}"
    return module, relative, "-" if change.cosine is None else f"{change.cosine:.4f}"


def _key_value_table(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def _yaml(config: Mapping[str, object]) -> Text:
    return Text(indent(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip(), "  "))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 50 else f"{text[:47]}..."


def _format_if(value: str | None, template: str) -> str:
    return template.format(value) if value else ""
