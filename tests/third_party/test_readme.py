"""The README's section "Use it from your code", run verbatim against a server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningServer

README = Path(__file__).parents[2] / "README.md"
CHAPTER = README.read_text(encoding="utf-8").split("## Use it from your code\n")[1].split("\n## ")[0]
PROGRAMS = re.findall(r"^```python\n(.*?)^```", CHAPTER, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^\$ (curl .*?}')$", CHAPTER, re.MULTILINE | re.DOTALL)


def test_the_chapter_has_curl_openai_and_langchain() -> None:
    assert len(COMMANDS) == 2
    assert [re.findall(r"^from (\w+)", program)[0] for program in PROGRAMS] == ["openai", "langchain_openai"]


@pytest.mark.parametrize("command", COMMANDS, ids=["stream", "tokenize"])
def test_curl_gets_an_answer(server: RunningServer, command: str) -> None:
    answer = run(server, "bash", "-c", f"{command} --fail --silent --show-error")
    assert '"count":' in answer or answer.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("program", PROGRAMS, ids=["openai", "langchain"])
def test_the_program_prints_an_answer(server: RunningServer, program: str) -> None:
    assert run(server, sys.executable, "-c", program).strip()


def run(server: RunningServer, *command: str) -> str:
    arguments = [word.replace("http://127.0.0.1:8000", server.url) for word in command]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
