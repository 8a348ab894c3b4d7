"""The guarantees in tests/README.md: every row is enforced by tests that exist, and no enforced promise is missing."""

import re
from pathlib import Path

from tests.repository.documents import ROOT

TESTS = ROOT / "tests"
ROWS = re.findall(r"^\| ((?:[A-H]\d+(?:-[A-H]\d+)?(?:, )?)+) \| (.+)$", (TESTS / "README.md").read_text(), re.MULTILINE)


def numbers(cell: str) -> set[str]:
    """`A3, A5` and `B1-B8` written out."""
    ids: set[str] = set()
    for part in cell.split(", "):
        first, _, last = part.partition("-")
        ids |= {f"{first[0]}{i}" for i in range(int(first[1:]), int((last or first)[1:]) + 1)}
    return ids


def promises_in(path: Path) -> set[str]:
    """The numbers that the tests of a file, or of all files of a folder, are marked with."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    markers = [marker for file in files for marker in re.findall(r"mark\.promise\(([^)]*)\)", file.read_text())]
    return {number for marker in markers for number in re.findall(r'"([A-H]\d+)"', marker)}


def test_every_row_selects_a_test_in_one_of_the_files_that_it_links() -> None:
    assert len(ROWS) > 20
    for cell, rest in ROWS:
        linked = [TESTS / link for link in re.findall(r"\]\(([^)]+)\)", rest)]
        enforced = set().union(*map(promises_in, linked))
        assert numbers(cell) & enforced, f"{cell}: {linked}"


def test_every_number_of_the_table_is_enforced_and_every_enforced_number_is_in_it() -> None:
    listed = set().union(*(numbers(cell) for cell, _ in ROWS))
    assert listed == promises_in(TESTS)
