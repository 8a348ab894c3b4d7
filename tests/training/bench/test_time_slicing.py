"""Interleaved processes: one runs at a time, with its children, and none is left over."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from training.bench import time_slicing as time_slicing
from training.bench.time_slicing import SlicedProcess, run_interleaved

# Ticks in this process and in a child, until this process has ticked argv[2] times.
_TICKER = """
import subprocess, sys, time
child = "import time\\nwhile True:\\n    print(time.time(), file=open({path!r}, 'a'))\\n    time.sleep(0.005)"
child = subprocess.Popen([sys.executable, "-c", child.format(path=sys.argv[1])])
for _ in range(int(sys.argv[2])):
    print(time.time(), file=open(sys.argv[1], "a"))
    time.sleep(0.005)
child.kill()
print("done")
"""


def ticker(path: Path, ticks: int) -> list[str]:
    return [sys.executable, "-c", _TICKER, str(path), str(ticks)]


def ticks_of(path: Path) -> list[float]:
    return sorted(float(line) for line in path.read_text().split())


def test_active_seconds_are_those_of_the_slices() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], text=True) as process:
        sliced = SlicedProcess(process, sys.stdout, sys.stderr, [(10.0, 11.0), (13.0, 14.5), (16.0, 17.0)])
    assert sliced.active_s(0, 100) == 3.5
    assert sliced.active_s(10.5, 14.0) == 1.5
    assert sliced.active_s(14.75, 15.5) == 0


def test_one_runs_at_a_time_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slicing, "_SLICE_S", 0.2)
    files = {name: tmp_path / name for name in ("a", "b")}
    commands = {name: ticker(file, 120) for name, file in files.items()}
    results = run_interleaved(commands, lambda name: files[name].exists())
    assert [output for _, output in results.values()] == ["done\n", "done\n"]
    for name, (sliced, _) in results.items():
        ticks = ticks_of(files[name])
        assert len(sliced.slices) > 3
        assert len(ticks) > 150  # the child's too
        slack_s = 0.03  # between the signal and the end of a slice
        assert all(any(b - slack_s <= at <= e + slack_s for b, e in sliced.slices) for at in ticks)
    both = sorted(span for sliced, _ in results.values() for span in sliced.slices)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(both))


def test_a_failure_is_named_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slicing, "_SLICE_S", 0.1)
    monkeypatch.setattr(time_slicing, "_SHUTDOWN_TIMEOUT_S", 2.0)
    fails = [sys.executable, "-c", "import sys, time; time.sleep(0.15); sys.exit('no such base')"]
    commands = {"long": ticker(tmp_path / "long", 100_000), "short": fails}
    with pytest.raises(RuntimeError, match=r"(?s)^short failed:\n.*no such base"):
        run_interleaved(commands, lambda name: name == "short" or (tmp_path / name).exists())
    time.sleep(0.1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
