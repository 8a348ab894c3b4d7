"""The quick tier, `make test`, leaves no promise without a test."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.tiers import COLLECTED, is_slow, promises_of

PROJECT = Path(__file__).parents[2]
_COLLECT = """
import json
import pytest
from tests.repository.test_tiers import promises_by_tier

class Promises:
    def pytest_collection_finish(self, session):
        print(json.dumps(promises_by_tier(session.items)))

pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider"], plugins=[Promises()])
"""


def promises_by_tier(items: Iterable[pytest.Item]) -> dict[str, list[str]]:
    quick: set[str] = set()
    slow: set[str] = set()
    for item in items:
        (slow if is_slow(item) else quick).update(promises_of(item))
    return {"quick": sorted(quick), "slow": sorted(slow)}


def test_every_promise_has_a_test_that_is_not_slow(request: pytest.FixtureRequest) -> None:
    collected = request.config.stash[COLLECTED]
    files = {path for path in (PROJECT / "tests").rglob("test_*.py") if path.parent.name != "third_party"}
    if files <= {item.path for item in collected}:
        tiers = promises_by_tier(collected)
    else:  # this session has only some of the tests: another one collects them
        done = subprocess.run(
            [sys.executable, "-c", _COLLECT], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        tiers = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert {"A1", "B11", "C1", "D12", "E2"} <= set(tiers["quick"])
    assert set(tiers["slow"]) <= set(tiers["quick"])
