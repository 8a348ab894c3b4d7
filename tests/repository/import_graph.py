"""The import graph of the project's packages: `python -m tests.repository.import_graph [FOLDER]` prints its rooms.

A room is a folder, or a file that lies directly in `training`, `deployments` or `clients`. Every import counts, also
one inside a function or under TYPE_CHECKING. The floor of a room is the length of the longest chain of imports below
it: a room on floor 1 imports no other room of its package.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("training", "deployments", "clients")

Graph = Mapping[str, set[str]]


def imported_names(tree: ast.AST, *, everywhere: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; without `everywhere` only what runs when it is imported.

    `from training import errors` gives `training.errors`, `from training.errors import X` gives `training.errors.X`.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (in_function or type_checking):
            pending += ast.iter_child_nodes(node)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The dotted name and path of every module of the three packages."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {_dotted(path.relative_to(root)): path for path in paths}


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of the three packages each module imports."""
    project_modules = modules(root)
    return {
        name: {
            module
            for imported in imported_names(ast.parse(path.read_text(encoding="utf-8")))
            for module in (imported, imported.rpartition(".")[0])
            if module in project_modules and not project_modules[module].name.startswith("__init__")
        }
        - {name}
        for name, path in project_modules.items()
        if path.name != "__init__.py"
    }


def room(module: str) -> str:
    """The folder of a module; a file directly in a package is a room of its own."""
    folder = module.rpartition(".")[0]
    return module if folder in PACKAGES else folder


def room_graph(graph: Graph) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, imported in graph.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    return rooms


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other in a cycle (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[-len(component) :]
            if len(component) > 1:
                components.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return components


def floors(graph: Graph) -> dict[str, int]:
    """The floor of every node of a graph without cycles."""
    floor_of: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in floor_of:
            floor_of[node] = 1 + max(map(floor, graph[node]), default=0)
        return floor_of[node]

    return {node: floor(node) for node in graph}


def within(graph: Graph, package: str) -> dict[str, set[str]]:
    """The part of a graph that lies in one package."""
    nodes = {node for node in graph if node.split(".")[0] == package}
    return {node: graph[node] & nodes for node in nodes}


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _print_rooms(root: Path) -> None:
    graph = import_graph(root)
    for package in PACKAGES:
        subgraph = within(graph, package)
        rooms = within(room_graph(graph), package)
        circles = cycles(rooms)
        print(f"{package}: {len(subgraph)} files in {len(rooms)} rooms, {len(cycles(subgraph))} cycles between files")
        if circles:
            print("  cycles between rooms: " + "; ".join(" ".join(circle) for circle in circles))
            continue
        by_floor: dict[int, list[str]] = {}
        for name, floor in floors(rooms).items():
            by_floor.setdefault(floor, []).append(name)
        for floor in sorted(by_floor, reverse=True):
            print(f"  floor {floor}: {_listed(by_floor[floor], subgraph)}")


def _listed(rooms: Iterable[str], files: Graph) -> str:
    counts = {name: sum(room(module) == name for module in files) for name in sorted(rooms)}
    return ", ".join(name if count == 1 else f"{name} ({count} files)" for name, count in counts.items())


if __name__ == "__main__":
    _print_rooms(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
