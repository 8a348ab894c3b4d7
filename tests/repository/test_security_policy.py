"""The tests that `.github/SECURITY.md` names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_policy_names_exists() -> None:
    referenced = set(re.findall(r"`(test_\w+)`", (ROOT / ".github" / "SECURITY.md").read_text()))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(referenced) > 15
    assert referenced - defined == set()
