"""The tests that `.github/SECURITY.md` names exist, and no code of ours executes data (C6)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Calls by which bytes from elsewhere become code. (yaml.load cannot be called without saying which loader.)
_RUNNING = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads", "joblib.load",
    "cloudpickle.loads", "marshal.loads", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
_SWITCHES = {"trust_remote_code": True, "shell": True, "weights_only": False, "allow_pickle": True}


def test_every_test_that_the_policy_names_exists() -> None:
    referenced = set(re.findall(r"`(test_\w+)`", (ROOT / ".github" / "SECURITY.md").read_text()))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(referenced) > 15
    assert referenced - defined == set()


def dangerous(source: str) -> Iterator[str]:
    """Calls in `source` that execute their arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in _RUNNING:
                yield f"line {node.lineno}: {ast.unparse(node.func)}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in _SWITCHES and value == _SWITCHES[keyword.arg]:
                    yield f"line {node.lineno}: {keyword.arg}={value}"


@pytest.mark.promise("C6")
def test_no_code_comes_from_data() -> None:
    calls_by_file = {
        str(path): calls
        for package in ("training", "deployments", "clients")
        for path in (ROOT / package).rglob("*.py")
        if (calls := list(dangerous(path.read_text())))
    }
    assert calls_by_file == {}


def test_the_search_for_dangerous_calls_finds_them() -> None:
    assert len(list(dangerous("eval(x)\ntorch.load(f)\nsubprocess.run(c, shell=True)\nf(trust_remote_code=True)"))) == 4
    assert not list(dangerous("re.compile(x)\nsubprocess.run(c)\nmodel.eval()\nsafetensors.torch.load_file(f)"))
