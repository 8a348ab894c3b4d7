"""Adapter versions for a person to read: a whole lineage, and what differs between two versions.

`clients.cli.adapters` calls it; the same facts as JSON are printed there.
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
_WIDTH = 160  # where the output is no terminal


def print_report(report: RenderableType) -> None:
    """Print to stdout, as wide as the terminal."""
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(width=_WIDTH, highlight=False)
    console.print(report)


def show_report(
    manifest: "AdapterManifest", aliases: Sequence[str], ancestors: Sequence["AdapterManifest"]
) -> RenderableType:
    """One version: what it is, what it was made from and with, how good it is, and what it says."""
    title = Text(manifest.model_id, style="bold")
    if aliases:
        title.append(f"  {', '.join(aliases)}", style="green")
    parts: list[RenderableType] = [title, _facts(manifest), _lineage(manifest, ancestors)]
    for sample in manifest.samples:
        answers = _rows({"asked": sample.prompt, "dataset": sample.reference, "base": sample.base})
        answers.add_row("adapter", Text(sample.adapter, style="bold"))
        parts.append(answers)
    if manifest.config is not None:
        parts += [Text("config", style="bold"), _yaml(manifest.config)]
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += [part, Text()]
    return Group(*spaced[:-1])


def diff_report(
    a: "AdapterManifest", b: "AdapterManifest", changes: Sequence["FieldChange"], weights: "WeightsDiff | None"
) -> RenderableType:
    """Fields and weights in which `b` differs from `a`; `weights` is None where the bases differ."""
    from training.registry.diff import to_text

    parts: list[RenderableType] = []
    if changes:
        table = Table("", a.model_id, b.model_id, box=SIMPLE_HEAD, pad_edge=False)
        for change in changes:
            table.add_row(change.key, to_text(change.a), to_text(change.b))
        parts.append(table)
    else:
        parts.append(Text(f"the manifests of {a.model_id} and {b.model_id} say the same"))
    if weights is None:
        parts.append(Text("weights are not compared: the two were trained on different bases"))
    elif weights.overall.relative_change == 0:
        parts.append(Text("the weights are equal"))
    else:
        table = Table("weights", "relative change", "cosine", box=SIMPLE_HEAD, pad_edge=False)
        for module in (weights.overall, *weights.modules[:_TOP_MODULES]):
            table.add_row(*_weight_cells(module, len(weights.modules)))
        if len(weights.modules) > _TOP_MODULES:
            table.add_row(f"{len(weights.modules) - _TOP_MODULES} more changed less", "", "")
        parts.append(table)
    return Group(*parts)


def verify_report(manifest: "AdapterManifest", compared: Sequence["Comparison"]) -> RenderableType:
    """Each prompt, and whether PEFT and the engine gave the same."""
    table = Table("prompt", "answer", "tokens", "greedy", "log-probability", "", box=SIMPLE_HEAD, pad_edge=False)
    for one in compared:
        table.add_row(
            _short(one.prompt),
            _short(one.answer),
            str(one.num_tokens),
            "equal" if one.same_tokens else "differ",
            f"{one.max_difference:.1e} apart",
            Text("ok", style="green") if one.passed else Text("differs", style="bold red"),
        )
    failed = sum(not one.passed for one in compared)
    verdict = (
        f"{failed} of {len(compared)} prompts are served otherwise than PEFT answers them"
        if failed
        else f"{manifest.model_id} is whole, loads with AutoPeftModelForCausalLM, and is served as PEFT answers"
    )
    return Group(table, Text(verdict, style="bold red" if failed else "green"))


def _facts(manifest: "AdapterManifest") -> Table:
    metrics, lora = manifest.metrics, manifest.lora
    facts = {"created": f"{manifest.created:%Y-%m-%d %H:%M} UTC" + _of(manifest.run_name, " by run {}")}
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
        compared = ", the reference's" if _prefers(manifest) else " nats, the base's"
        facts[_loss_name(manifest)] = (
            f"{metrics['eval_loss']:.4f}{compared} {metrics['base_eval_loss']:.4f}"
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
    facts["base held in"] = (
        f"{quantization.quant_type}{', double quantization' if quantization.double_quant else ''}, "
        f"computed in {quantization.compute_dtype}"
    )
    facts["chat format"] = manifest.chat_format
    if environment := manifest.environment:
        facts["code"] = f"{environment.code_version or 'not installed'}{_of(environment.git_commit, ', commit {}')}"
        facts["libraries"] = ", ".join(f"{name} {version}" for name, version in environment.libraries.items())
        facts["hardware"] = ", ".join(
            f"{environment.devices.count(device)} x {device}" for device in dict.fromkeys(environment.devices)
        )
    facts["weights"] = f"sha256 {manifest.weights_sha256}, {manifest.files['adapter_model.safetensors'].size:,} bytes"
    return _rows(facts)


def _lineage(manifest: "AdapterManifest", ancestors: Sequence["AdapterManifest"]) -> Tree:
    """From the base down to this version."""
    base = manifest.base
    tree = Tree(Text(f"{base.source}{_of(base.revision, ' at {}')}, weights sha256 {base.weights_sha256[:12]}"))
    at = tree
    oldest = ancestors[-1] if ancestors else manifest
    if oldest.parent is not None:
        gone = f"{oldest.parent}: deleted or replaced since, weights sha256 {oldest.parent.weights_sha256[:12]}"
        at = at.add(Text(gone, style="yellow"))
    for version in (*reversed(ancestors), manifest):
        label = Text(f"{version.name}@{version.version}", style="bold" if version is manifest else "")
        label.append(f"  {', '.join(filter(None, [version.method or '', _loss(version), _sources(version)]))}")
        if version.parent and version.parent.other_split:
            warning = f"{version.parent} may know its held-out rows: {version.parent.other_split}"
            label.append(f"\n{warning}", style="yellow")
        at = at.add(label)
    return tree


def _loss(manifest: "AdapterManifest") -> str:
    return f"{_loss_name(manifest)} {manifest.metrics['eval_loss']:.4f}" if "eval_loss" in manifest.metrics else ""


def _loss_name(manifest: "AdapterManifest") -> str:
    """Preference losses are no cross entropy: they say nothing beside one."""
    return f"held-out {manifest.method.upper()} loss" if manifest.method and _prefers(manifest) else "held-out loss"


def _prefers(manifest: "AdapterManifest") -> bool:
    return manifest.method in ("dpo", "kto")


def _sources(manifest: "AdapterManifest") -> str:
    return f"on {', '.join(manifest.dataset.sources)}" if manifest.dataset else ""


def _weight_cells(change: "WeightChange", num_modules: int) -> tuple[str, str, str]:
    module = f"all {num_modules} modules" if change.module == "all" else change.module
    relative = "from zero" if change.relative_change is None else f"{change.relative_change:.2%}"
    return module, relative, "-" if change.cosine is None else f"{change.cosine:.4f}"


def _rows(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def _yaml(config: Mapping[str, object]) -> Text:
    return Text(indent(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip(), "  "))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 50 else f"{text[:47]}..."


def _of(value: str | None, text: str) -> str:
    return text.format(value) if value else ""
