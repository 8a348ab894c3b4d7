"""`corral adapters ...`: the registry from a terminal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.registry import AdapterManifest, AdapterRegistry

app = typer.Typer(help="List, inspect, import, promote, roll back and delete adapters.", no_args_is_help=True)

_Registry = Annotated[
    str | None, typer.Option("--registry", metavar="PATH", help="any fsspec path; default: CORRAL_HOME/registry")
]
_Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
_Version = Annotated[int, typer.Argument(metavar="VERSION", show_default=False)]
_Alias = Annotated[str, typer.Option("--alias", help="which alias")]


@app.command("list")
def list_(registry: _Registry = None, as_json: _Json = False) -> None:
    """Every version of every adapter."""
    store = _open(registry)
    manifests = store.list()
    aliases = {name: store.aliases(name) for name in {manifest.name for manifest in manifests}}
    if as_json:
        print(json.dumps([_record(manifest, aliases[manifest.name]) for manifest in manifests], indent=2))
    elif not manifests:
        print("no adapter is registered: train one with 'corral train configs/train/quickstart.yaml'")
    else:
        _print_table(manifests, aliases)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", show_default=False)],
    registry: _Registry = None,
    as_json: _Json = False,
) -> None:
    """One version: the champion, else the newest, or the one that is named."""
    store = _open(registry)
    manifest = _resolve(store, name)
    record = _record(manifest, store.aliases(manifest.name))
    if as_json:
        print(json.dumps(record, indent=2))
        return
    import yaml

    print(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), end="")


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a PEFT folder", show_default=False)],
    name: _Name,
    base: Annotated[
        str | None, typer.Option("--base", help="name, hub id or directory; default: the embedded model")
    ] = None,
    chat_format: Annotated[str, typer.Option(help="auto, llama-2, llama-3 or chatml")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="register it without held-out figures")] = False,
    registry: _Registry = None,
) -> None:
    """Register an adapter that was trained elsewhere (PEFT, TRL, Axolotl)."""
    from training.base_models import EMBEDDED_MODEL, resolve_base_model
    from training.chat_format import load_chat_format
    from training.registry import import_adapter

    model = resolve_base_model(base or EMBEDDED_MODEL)
    format_name = load_chat_format(chat_format, model).name
    manifest = import_adapter(_open(registry), directory, name, model, chat_format=format_name, force=force)
    print(f"{manifest.model_id} is registered" + (" (forced)" if manifest.forced else ""))


@app.command()
def promote(name: _Name, version: _Version, alias: _Alias = "champion", registry: _Registry = None) -> None:
    """Point an alias at a version; requests that name no version get the champion."""
    manifest = _open(registry).promote(name, version, alias)
    print(f"{manifest.base.name}:{name}@{alias} is version {manifest.version}")


@app.command()
def rollback(name: _Name, alias: _Alias = "champion", registry: _Registry = None) -> None:
    """Point an alias at what it pointed at before."""
    manifest = _open(registry).rollback(name, alias)
    print(f"{manifest.base.name}:{name}@{alias} is version {manifest.version}")


@app.command()
def delete(name: _Name, version: _Version, registry: _Registry = None) -> None:
    """Remove a version for good; its number is not used again."""
    _open(registry).delete(name, version)
    print(f"{name}@{version} is deleted")


def _open(path: str | None) -> "AdapterRegistry":
    from training.registry import AdapterRegistry

    return AdapterRegistry(path)


def _resolve(store: "AdapterRegistry", text: str) -> "AdapterManifest":
    """Accept `ranch-hand`, `ranch-hand@2` and the whole model id."""
    from training.errors import AdapterNotFound

    base, colon, rest = text.rpartition(":")
    name, at, ref = rest.partition("@")
    manifest = store.resolve(name, ref if at else None)
    if colon and base != manifest.base.name:
        raise AdapterNotFound(f"adapter {name!r} is not one of {base!r}: it was trained on {manifest.base.name!r}")
    return manifest


def _record(manifest: "AdapterManifest", aliases: dict[str, int]) -> dict[str, Any]:
    at_this = sorted(alias for alias, version in aliases.items() if version == manifest.version)
    return {"model_id": manifest.model_id, "aliases": at_this, **manifest.model_dump(mode="json")}


def _print_table(manifests: list["AdapterManifest"], aliases: dict[str, dict[str, int]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "aliases", "held-out loss", "base's", "created", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for manifest in manifests:
        at_this = sorted(alias for alias, version in aliases[manifest.name].items() if version == manifest.version)
        table.add_row(
            manifest.model_id,
            ", ".join(at_this),
            _loss(manifest, "eval_loss") + (" (forced)" if manifest.forced else ""),
            _loss(manifest, "base_eval_loss"),
            f"{manifest.created:%Y-%m-%d %H:%M} UTC",
        )
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    console.print(table)


def _loss(manifest: "AdapterManifest", key: str) -> str:
    return f"{manifest.metrics[key]:.3f}" if key in manifest.metrics else "-"
