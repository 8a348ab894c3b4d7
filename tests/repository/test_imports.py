"""The rules of the layout, over the import graph: one direction between packages, no cycles, and light clients."""

import ast
import subprocess
import sys

import pytest

from tests.repository.import_graph import (
    PACKAGES,
    ROOT,
    cycles,
    floors,
    import_graph,
    imported_names,
    modules,
    room_graph,
    within,
)

HEAVY = {"torch", "ray", "transformers", "gradio", "datasets", "peft", "trl", "bitsandbytes", "cryptography"}
MAY_IMPORT = {"training": {"training"}, "deployments": {"training", "deployments"}, "clients": set(PACKAGES)}
SHARED_ROOMS = ("errors", "home", "names", "local_ray", "base_models", "chat", "registry")  # what serving may know
FORBIDDEN_NAMES = {"common", "utils", "helpers", "base", "misc"}
WIRE_BASE = "deployments.protocol.base"  # what every part of the wire format is built from

GRAPH = import_graph()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package: str) -> None:
    for module, imported in GRAPH.items():
        if module.split(".")[0] == package:
            others = {name.split(".")[0] for name in imported}
            assert others <= MAY_IMPORT[package], f"{module} imports {sorted(others)}"


def test_serving_imports_only_the_shared_rooms_of_training() -> None:
    for module in (name for name in GRAPH if name.startswith("deployments.")):
        for imported in (name for name in GRAPH[module] if name.startswith("training.")):
            assert imported.split(".")[1] in SHARED_ROOMS, f"{module} imports {imported}"


def test_shared_rooms_import_nothing_of_training_but_each_other_and_storage() -> None:
    allowed = {*SHARED_ROOMS, "storage", "dotted_keys"}
    for module, imported in within(GRAPH, "training").items():
        if module.split(".")[1] in SHARED_ROOMS:
            assert {name.split(".")[1] for name in imported} <= allowed, module


def test_no_cycle_between_files() -> None:
    assert cycles(GRAPH) == []


def test_no_cycle_between_rooms() -> None:
    assert cycles(room_graph(GRAPH)) == []


def test_cycles_and_floors_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


def test_the_graph_sees_imports_everywhere() -> None:
    source = "import a.b\ndef f():\n    from c import d\nif TYPE_CHECKING:\n    import e\n"
    assert set(imported_names(ast.parse(source))) == {"a.b", "c.d", "e"}
    assert set(imported_names(ast.parse(source), everywhere=False)) == {"a.b"}


def test_clients_import_nothing_heavy_at_module_top() -> None:
    for name, path in modules().items():
        if name.startswith("clients"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not HEAVY & {top.split(".")[0] for top in imported_names(tree, everywhere=False)}, path


@pytest.mark.parametrize(
    "module",
    ["clients", "clients.api", "clients.cli.certs", "clients.cli.main", "clients.demo", "clients.doctor.doctor"],
)
def test_importing_a_client_pulls_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_package_inits_are_empty_and_in_every_folder() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").read_text() == "", folder


def test_files_and_folders_are_named_for_what_they_hold() -> None:
    for module in GRAPH:
        if module != WIRE_BASE:
            assert not FORBIDDEN_NAMES & set(module.split(".")), module


def test_imports_are_absolute() -> None:
    for path in modules().values():
        names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
        assert not [name for name in names if name.startswith(".")], path
