"""The project's Markdown files, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "*/README.md", "*/*/README.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts[len(ROOT.parts)]
)
GPU_OR_HUB_HEADING = "## Commands that need a GPU or a hub\n"


def commands_in(text: str) -> list[str]:
    """Every `$ command` of the console blocks, on one line each, without comments."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ ((?:.*\\\n)*(?:.*'\{\n(?:.*\n)*?.*\}'|.*))$", "\n".join(blocks), re.MULTILINE)
    return [" ".join(re.sub(r"\s{2,}#.*$", "", command.replace("\\\n", " ")).split()) for command in commands]


def documented_commands() -> dict[str, Path]:
    """Every command of all documents, and a document that has it."""
    return {command: path for path in DOCUMENTS for command in commands_in(path.read_text(encoding="utf-8"))}


def gpu_or_hub_commands() -> set[str]:
    """The one list of commands that cannot run on a CPU without a hub."""
    section = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").split(GPU_OR_HUB_HEADING)[1]
    return set(re.findall(r"^\| `([^`]+)`", section.split("\n## ")[0], re.MULTILINE))


def names_a_test(name: str) -> bool:
    """Whether `path::test_name` names a test function of this project."""
    path, _, function = name.partition("::")
    file = ROOT / "tests" / path
    return file.is_file() and re.search(rf"^(?:async )?def {function}\(", file.read_text(), re.MULTILINE) is not None
