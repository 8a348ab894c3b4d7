"""C8: a line for every change that only administrators may make."""

import json
import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from training.errors import CorralError, RegistryError
from training.registry.audit import AUDIT_FILE, audited, os_user


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entries(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / AUDIT_FILE).read_text().splitlines()]


@pytest.mark.promise("C8")
def test_what_was_done_refused_and_failed(home: Path) -> None:
    with audited({"key_id": "k1", "name": "ops"}, "promote", "ranch", version=2) as result:
        result["before"], result["after"] = {"version": 1}, {"version": 2}
    with pytest.raises(RegistryError), audited(os_user(), "delete", "ranch@2"):
        raise RegistryError("it is the champion")
    with pytest.raises(ZeroDivisionError), audited(os_user(), "delete", "ranch@2"):
        _ = 1 / 0
    success, refusal, failed = entries(home)
    assert success.pop("time").endswith("+00:00")
    assert success == {
        "actor": {"key_id": "k1", "name": "ops"},
        "action": "promote",
        "target": "ranch",
        "version": 2,
        "before": {"version": 1},
        "after": {"version": 2},
        "outcome": "done",
    }
    assert (refusal["outcome"], refusal["reason"]) == ("refused", "it is the champion")
    assert refusal["actor"]["user"]
    assert (failed["outcome"], failed["reason"]) == ("failed", "ZeroDivisionError")
    assert stat.S_IMODE((home / AUDIT_FILE).stat().st_mode) == 0o600


@pytest.mark.promise("C8")
def test_lines_of_many_writers_do_not_mix(home: Path) -> None:
    def change(number: int) -> None:
        with audited(os_user(), "promote", f"a{number}" * 500):
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(change, range(400)))
    assert sorted(entry["target"] for entry in entries(home)) == sorted(f"a{number}" * 500 for number in range(400))


@pytest.mark.promise("C8")
def test_nothing_is_done_that_cannot_be_recorded(home: Path) -> None:
    (home / AUDIT_FILE).mkdir(parents=True)
    changed = False
    with (
        pytest.raises(CorralError, match=r"not done, because .*audit\.jsonl cannot be written"),
        audited(os_user(), "promote", "ranch"),
    ):
        changed = True
    assert not changed


@pytest.mark.promise("C8")
def test_a_full_disk_is_logged_and_what_was_done_stays_done(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid = os.fork()
    if pid == 0:  # limits of a process cannot be lifted again
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with audited(os_user(), "promote", "ranch"):
            pass
        os._exit(0 if "not recorded" in caplog.text else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
