"""Imports go one way, training <- deployments <- clients, and a client's machine needs neither torch nor Ray."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("training", "deployments", "clients")
HEAVY = {"torch", "ray", "transformers", "gradio", "datasets", "peft", "trl", "bitsandbytes", "cryptography"}
# What serving may know of training.
SHARED = {"errors", "home", "ray_token", "local_ray", "chat", "registry", "base_models"}


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; without `everywhere` only what runs when it is imported."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from training import errors` imports training.errors
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (in_function or type_checking):
            pending += ast.iter_child_nodes(node)


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 3
    return found


def test_training_imports_neither_serving_nor_clients() -> None:
    for path in modules("training"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("deployments", "clients")], path


def test_serving_takes_only_the_shared_contracts_from_training() -> None:
    for path in modules("deployments"):
        for name in imports(path):
            first, _, rest = name.partition(".")
            assert first != "clients", path
            part = rest.split(".")[0]
            assert first != "training" or part in SHARED, f"{path} imports {name}"


def test_clients_import_nothing_heavy_at_module_top() -> None:
    for path in modules("clients"):
        assert not HEAVY & {name.split(".")[0] for name in imports(path, everywhere=False)}, path


@pytest.mark.parametrize(
    "module", ["clients", "clients.api", "clients.cli.certs", "clients.cli", "clients.demo", "clients.doctor.doctor"]
)
def test_importing_a_client_pulls_in_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_package_inits_are_empty() -> None:
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert init.read_text() == "", init
