"""The progress display: a bar on a terminal, few lines in a log, wherever the run's state is read from."""

import os
import pty
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from training.runs.progress import Progress, read_progress, show_progress, write_progress
from training.runs.run_dir import RunDir

TRAINING = Progress("training", 3, 12, 1.25, 1234.0, 3725.0)


def test_written_progress_is_read_back_with_its_heartbeat(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, "run")
    assert read_progress(run_dir) is None
    training = replace(TRAINING, time=time.time())
    write_progress(run_dir, training)
    assert read_progress(run_dir) == training
    assert abs(Progress("loading").time - time.time()) < 60
    (tmp_path / "run" / "progress.json").write_text('{"phase": "tra')
    assert read_progress(run_dir) is None


def test_line_names_step_loss_speed_and_time_left() -> None:
    assert str(TRAINING) == "training  step 3/12  loss 1.250  1,234 tokens/s  1:02:05 left"
    assert str(Progress("loading x in 4 bit")) == "loading x in 4 bit"


def test_a_log_gets_a_line_for_each_phase_and_not_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    states = [
        Progress("loading"),
        *(Progress("training", step, 90, 1.0, 10.0) for step in range(1, 90)),
        Progress("end"),
    ]
    shown_states, all_shown = iter(states), threading.Event()

    def next_state() -> Progress | None:
        state = next(shown_states, None)
        if state is None:
            all_shown.set()
        return state

    with show_progress(next_state, "ranch [hand]", poll_s=0.001):
        assert all_shown.wait(timeout=300)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"ranch [hand]: {p}" for p in ("loading", "training", "end")]


def test_a_terminal_gets_a_bar_with_step_loss_speed_and_time_left() -> None:
    script = """
import time
from training.runs.progress import Progress, show_progress
with show_progress(lambda: Progress("training", 3, 12, 1.25, 1234.0, 65.0), "ranch-hand", poll_s=0.01):
    time.sleep(0.5)
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=environment) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                output += os.read(ours, 65536)
            except OSError:  # the terminal is closed
                break
        assert process.wait(timeout=300) == 0
    os.close(ours)
    text = output.decode()
    assert "3/12  loss 1.250  1,234 tokens/s  1:05 left" in text
    assert "\u2501" in text  # the bar
