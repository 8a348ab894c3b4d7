"""The README's path from a CSV file to a served adapter, command by command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningServer

README = Path(__file__).parents[2] / "README.md"


def chapter_commands() -> list[list[str]]:
    """The words of every `$ corral ...` in "Train on your own data", up to its first subsection."""
    chapter = README.read_text(encoding="utf-8").split("## Train on your own data\n")[1].split("\n### ")[0]
    return [shlex.split(line) for line in re.findall(r"^\$ corral (.*)$", chapter, re.MULTILINE)]


def corral(*words: str) -> str:
    command = [sys.executable, "-m", "clients.cli", *words]
    result = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, timeout=800, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_chapter_goes_from_a_csv_to_an_adapter_that_answers(server: RunningServer) -> None:
    check, train, adapters, chat = chapter_commands()
    checked = corral(*check)
    for line in README.read_text(encoding="utf-8").split("$ corral data check", 1)[1].splitlines()[1:4]:
        assert line in checked
    assert "smollm2-135m:workshop@1 is registered" in corral(*train)
    assert "smollm2-135m:workshop@1" in corral(*adapters)
    assert "Tannery Lane" in corral(*chat, "--url", server.url)
