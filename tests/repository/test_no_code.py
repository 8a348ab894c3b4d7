"""What the packages' own code never does (C6): execute data as code, or pass a command to a shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for package in ("training", "deployments", "clients") for path in sorted((ROOT / package).rglob("*.py"))]
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads",
    "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput",
    "importlib.import_module", "runpy.run_path", "numpy.load", "np.load",
}  # fmt: skip
FORBIDDEN_TRUE = {"trust_remote_code", "shell", "allow_pickle", "share"}
FORBIDDEN_FALSE = {"weights_only"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "marshal", "shelve", "joblib"}


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases]


def offences(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    safe |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and safe & set(bases(node))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            loaders = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"}
            if called in FORBIDDEN_CALLS and not (called == "yaml.load" and loaders & safe):
                yield f"line {node.lineno}: {called}"
            for keyword in node.keywords:
                falsy = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in (FORBIDDEN_FALSE if falsy else FORBIDDEN_TRUE):
                    yield f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Import):
            yield from (f"line {node.lineno}: import {a.name}" for a in node.names if a.name in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.ImportFrom):
            if node.module in FORBIDDEN_IMPORTS:
                yield f"line {node.lineno}: from {node.module}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (f"line {node.lineno}: from {name}" for name in sorted(names & FORBIDDEN_CALLS))


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "torch.load(path, weights_only=False)",
        "from torch import load; import pickle",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=config.trust)",
        "subprocess.run('ls', shell=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "page.launch(share=True)",
        "load(path, weights_only=False)",
        "pickle.load(file)",
        "exec(code)",
    ],
)
def test_the_walk_sees_what_it_looks_for(source: str) -> None:
    assert list(offences(source))


@pytest.mark.promise("C6")
def test_no_code_from_data_and_no_shell() -> None:
    assert len(FILES) > 100
    violations = [f"{path.relative_to(ROOT)} {offence}" for path in FILES for offence in offences(path.read_text())]
    assert violations == []


def test_harmless_calls_of_similar_names_are_none() -> None:
    source = "re.compile(x)\nsubprocess.run(c)\nmodel.eval()\nsafetensors.torch.load_file(f)\nload(f)"
    assert list(offences(source)) == []
