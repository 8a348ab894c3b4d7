"""The quick tier, `make test`, leaves no promise without a test."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
_COLLECT = """
import json, sys
import pytest
from tests.tiers import is_slow, promises_of

class Promises:
    def pytest_collection_finish(self, session):
        tiers = {True: set(), False: set()}
        for item in session.items:
            tiers[is_slow(item)] |= promises_of(item)
        print(json.dumps({"quick": sorted(tiers[False]), "slow": sorted(tiers[True])}))

pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider"], plugins=[Promises()])
"""


def test_every_promise_has_a_test_that_is_not_slow() -> None:
    done = subprocess.run([sys.executable, "-c", _COLLECT], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tiers = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert {"A1", "B11", "C1", "D12", "E2"} <= set(tiers["quick"])
    assert set(tiers["slow"]) <= set(tiers["quick"])
