"""`corral adapters ...`: the adapter registry on the command line."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from clients.api import CorralClient
    from deployments.api.adapter_admin import AdapterAdmin
    from deployments.protocol.adapters import Adapter, AdapterVersion
    from training.registry.manifest import AdapterManifest
    from training.registry.registry import AdapterRegistry

app = typer.Typer(
    help="The adapter registry: list, show, diff, verify, export, import, promote, roll back, delete.",
    no_args_is_help=True,
)

_Registry = Annotated[
    str | None, typer.Option("--registry", metavar="PATH", help="any fsspec path; default: CORRAL_HOME/registry")
]
_Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="use this server's registry, with the key in CORRAL_API_KEY"),
]
_Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", show_default=False)]
# As in training.export.gguf, which is too slow to import for `--help`.
_GgufType = Literal["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"]
_MergeBase = Literal["nf4", "original"]
_Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
_Version = Annotated[int, typer.Argument(metavar="VERSION", show_default=False)]
_Alias = Annotated[str, typer.Option("--alias", help="alias to change")]


@app.command("list")
def list_(registry: _Registry = None, url: _Url = None, as_json: _Json = False) -> None:
    """List every version of every adapter."""
    if as_json and url is None:  # with the complete manifests
        store = _open(registry)
        print(json.dumps([_record(store, manifest) for manifest in store.list()], indent=2))
        return
    with _admin(registry, url) as admin:
        adapters = admin.adapters()
    if as_json:
        versions = [{"name": a.name, **version.model_dump(mode="json")} for a in adapters for version in a.versions]
        print(json.dumps(versions, indent=2))
    elif not adapters:
        print("no adapters are registered: train one with 'corral train configs/train/quickstart.yaml'")
    else:
        _print_table(adapters)


@app.command()
def show(name: _Reference, registry: _Registry = None, as_json: _Json = False) -> None:
    """Show a version and its lineage; without VERSION or ALIAS, the champion, else the newest."""
    store = _open(registry)
    manifest = _resolve(store, name)
    record, ancestors = _record(store, manifest), store.ancestors(manifest)
    if as_json:
        lineage = [ancestor.model_dump(mode="json") for ancestor in ancestors]
        print(json.dumps({**record, "ancestors": lineage}, indent=2))
        return
    from clients.cli.adapter_report import print_report, show_report

    print_report(show_report(manifest, _labels(record["aliases"], record["canary_percent"]), ancestors))


@app.command()
def diff(a: _Reference, b: _Reference, registry: _Registry = None, as_json: _Json = False) -> None:
    """Show how two versions differ: configuration, data, metrics, libraries and weights."""
    from dataclasses import asdict

    from clients.cli.adapter_report import diff_report, print_report
    from training.registry.diff import diff_manifests, diff_weights

    store = _open(registry)
    first, second = _resolve(store, a), _resolve(store, b)
    changes = diff_manifests(first, second)
    weights = None
    if first.base.weights_sha256 == second.base.weights_sha256:
        weights = diff_weights(store.fetch(first), first.lora, store.fetch(second), second.lora)
    if as_json:
        fields = [asdict(change) for change in changes]
        record = {"a": first.model_id, "b": second.model_id, "fields": fields}
        print(json.dumps({**record, "weights": None if weights is None else asdict(weights)}, indent=2))
    else:
        print_report(diff_report(first, second, changes, weights))


@app.command()
def verify(
    name: _Reference,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="repeatable; default: the manifest's samples, else built-in prompts"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="per answer")] = 32,
    registry: _Registry = None,
    as_json: _Json = False,
) -> int:
    """Check a version's files, and that PEFT and Corral's engine give the same answers with them (float32)."""
    from dataclasses import asdict

    from clients.cli.adapter_report import print_report, verify_report
    from clients.verify import verify as run_verification

    store = _open(registry)
    manifest = _resolve(store, name)
    comparisons = run_verification(store, manifest, prompts or [], max_tokens)
    passed = all(comparison.passed for comparison in comparisons)
    if as_json:
        records = [{**asdict(comparison), "passed": comparison.passed} for comparison in comparisons]
        print(json.dumps({"model_id": manifest.model_id, "passed": passed, "prompts": records}, indent=2))
    else:
        print_report(verify_report(manifest, comparisons))
    return 0 if passed else 1


@app.command()
def export(
    name: _Reference,
    merged: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write safetensors for transformers and vLLM to this folder")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="write this file for llama.cpp")] = None,
    gguf_type: Annotated[_GgufType, typer.Option(help="data type of its matrices")] = "F16",
    onto: Annotated[
        _MergeBase, typer.Option(help="merge into the 4-bit weights it was trained on, or into the original ones")
    ] = "nf4",
    eval_file: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="rows or .txt to measure on; default: the run's held-out rows"),
    ] = None,
    registry: _Registry = None,
    as_json: _Json = False,
) -> None:
    """Export a version as a standalone model, and measure how merging changes its loss."""
    from dataclasses import asdict

    import torch

    from training.base_models.resolve import resolve_base_model
    from training.export.export import ExportPaths, describe_losses
    from training.export.export import export as write_model
    from training.export.losses import evaluation_rows
    from training.registry.manifest import check_base

    targets = ExportPaths(merged, gguf, gguf_type)
    targets.check()
    store = _open(registry)
    manifest = _resolve(store, name)
    directory = store.fetch(manifest)
    base = resolve_base_model(manifest.base.source, manifest.base.revision)
    check_base(manifest, base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = evaluation_rows(manifest, base, eval_file)
    record = write_model(manifest, directory, base, targets, onto=onto, rows=rows, device=device)
    if as_json:
        print(json.dumps(asdict(record), indent=2))
        return
    weights = "dequantized NF4" if onto == "nf4" else "original 16-bit"
    paths = " and ".join(str(path) for path in (merged, gguf) if path is not None)
    print(f"{manifest.model_id} is merged into the {weights} weights of {base.source}: {paths}")
    print("\n".join(describe_losses(record)))


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a PEFT folder", show_default=False)],
    name: _Name,
    base: Annotated[
        str | None, typer.Option("--base", help="name, hub id or directory; default: the embedded model")
    ] = None,
    chat_format: Annotated[str, typer.Option(help="auto, llama-2, llama-3 or chatml")] = "auto",
    default_system: Annotated[
        str,
        typer.Option(help="system text that it was trained with where a dialog had none: template, none or the text"),
    ] = "template",
    force: Annotated[bool, typer.Option("--force", help="register it without held-out metrics")] = False,
    registry: _Registry = None,
) -> None:
    """Register an adapter that was trained elsewhere (PEFT, TRL, Axolotl)."""
    from training.base_models.embedded import EMBEDDED_MODEL
    from training.base_models.resolve import resolve_base_model
    from training.chat.detect import load_chat_format
    from training.registry.audit import audited, os_user
    from training.registry.publish import import_adapter

    model = resolve_base_model(base or EMBEDDED_MODEL)
    chat = load_chat_format(chat_format, model, default_system=default_system)
    with audited(os_user(), "register", name, source=str(directory)) as record:
        manifest = import_adapter(
            _open(registry),
            directory,
            name,
            model,
            chat_format=chat.name,
            default_system=chat.default_system,
            force=force,
        )
        record |= {"version": manifest.version, "forced": manifest.forced}
    print(f"{manifest.model_id} is registered" + (" (forced)" if manifest.forced else ""))


@app.command()
def promote(
    name: _Name,
    version: _Version,
    percent: Annotated[
        float, typer.Option(min=0, max=100, help="below 100: a canary with this share of the champion's traffic")
    ] = 100,
    alias: _Alias = "champion",
    registry: _Registry = None,
    url: _Url = None,
) -> None:
    """Point an alias at a version; requests without a version get the champion."""
    with _admin(registry, url) as admin:
        change = admin.promote(name, version, alias, percent)
    print(f"{change.base_model}:{name}@{alias} is version {change.version}", end="")
    print(f", and version {version} for {percent:g} % of its traffic" if change.canary else "")


@app.command()
def rollback(name: _Name, alias: _Alias = "champion", registry: _Registry = None, url: _Url = None) -> None:
    """End the canary; if there is none, point an alias at its previous version."""
    with _admin(registry, url) as admin:
        change = admin.rollback(name, alias)
    canary = change.previous_canary
    print(f"{change.base_model}:{name}@{alias} is version {change.version}", end="")
    print(f" alone: its canary, version {canary.version}, has ended" if canary else "")


@app.command()
def delete(name: _Name, version: _Version, registry: _Registry = None, url: _Url = None) -> None:
    """Delete a version permanently; its number is not reused."""
    with _admin(registry, url) as admin:
        admin.delete_version(name, version)
    print(f"{name}@{version} is deleted")


@contextmanager
def _admin(registry: str | None, url: str | None) -> "Iterator[AdapterAdmin | CorralClient]":
    """The registry itself, or the server at `url`: both have the same methods to list and change it."""
    if url is None:
        from deployments.api.adapter_admin import AdapterAdmin
        from training.registry.audit import os_user

        yield AdapterAdmin(_open(registry), os_user())
        return
    from clients.api import CorralClient
    from training.errors import ConfigError

    if registry is not None:
        raise ConfigError(f"--registry {registry} and --url {url}: give one of them")
    with CorralClient(url, os.environ.get("CORRAL_API_KEY")) as client:
        yield client


def _open(path: str | None) -> "AdapterRegistry":
    from training.registry.registry import AdapterRegistry

    return AdapterRegistry(path)


def _resolve(store: "AdapterRegistry", text: str) -> "AdapterManifest":
    """The manifest for `ranch-hand`, `ranch-hand@2` or a complete model id."""
    from training.errors import AdapterNotFound

    base, colon, rest = text.rpartition(":")
    name, at, ref = rest.partition("@")
    manifest = store.resolve(name, ref if at else None)
    if colon and base != manifest.base.name:
        raise AdapterNotFound(f"adapter {name!r} does not belong to {base!r}: it was trained on {manifest.base.name!r}")
    return manifest


def _record(store: "AdapterRegistry", manifest: "AdapterManifest") -> dict[str, Any]:
    aliases, canary = store.aliases(manifest.name), store.traffic(manifest.name).canary
    return {
        "model_id": manifest.model_id,
        "aliases": sorted(alias for alias, version in aliases.items() if version == manifest.version),
        "canary_percent": canary.percent if canary is not None and canary.version == manifest.version else None,
        **manifest.model_dump(mode="json"),
    }


def _print_table(adapters: "Sequence[Adapter]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "aliases", "held-out loss", "base's", "created", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for version in (version for adapter in adapters for version in adapter.versions):
        table.add_row(
            version.model_id,
            ", ".join(_labels(version.aliases, version.canary_percent)),
            _loss(version, "eval_loss") + (" (forced)" if version.forced else ""),
            _loss(version, "base_eval_loss"),
            f"{version.created:%Y-%m-%d %H:%M} UTC",
        )
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    console.print(table)


def _labels(aliases: Sequence[str], canary_percent: float | None) -> list[str]:
    return [*aliases, *([] if canary_percent is None else [f"canary {canary_percent:g} %"])]


def _loss(version: "AdapterVersion", key: str) -> str:
    return f"{version.metrics[key]:.3f}" if key in version.metrics else "-"
