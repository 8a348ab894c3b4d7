"""Threads that stand back behind the steps of training, and those that step forward, as the kernel sees them."""

import ctypes
import os
import platform
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from training.local_ray.cpu_priority import low_priority, normal_priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the policies are Linux's")

_PRINT_POLICY = "import os; print(os.sched_getscheduler(0))"


def in_a_thread(ask: Callable[[], int]) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def policy() -> int:
    return os.sched_getscheduler(0)


def turn_ns() -> int:
    """How long a turn the kernel grants the calling thread; 0 where it does not tell."""
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    attr = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None, use_errno=True).syscall(number, 0, attr, 48, 0) == 0
    turn: int = struct.unpack("=IIQiIQQQ", attr.raw)[5]
    return turn


def test_what_is_started_in_the_block_stands_back() -> None:
    with low_priority():
        assert in_a_thread(policy) == os.SCHED_BATCH
        printed = subprocess.run([sys.executable, "-c", _PRINT_POLICY], capture_output=True, text=True, check=True)
        assert int(printed.stdout) == os.SCHED_BATCH
    assert policy() == os.SCHED_OTHER
    assert in_a_thread(policy) == os.SCHED_OTHER


def test_one_thread_steps_forward_and_takes_its_helpers_along() -> None:
    def step() -> int:
        before = turn_ns()
        normal_priority()
        assert policy() == os.SCHED_OTHER
        assert turn_ns() in (before, 100_000_000)
        if tuple(map(int, platform.release().split(".")[:2])) >= (6, 12):
            assert turn_ns() == in_a_thread(turn_ns) == 100_000_000
        return in_a_thread(policy)

    with low_priority():
        assert in_a_thread(step) == os.SCHED_OTHER
        assert policy() == os.SCHED_BATCH  # the others stay back


def test_an_ordinary_thread_is_left_as_it_is() -> None:
    before = turn_ns()
    normal_priority()
    assert (policy(), turn_ns()) == (os.SCHED_OTHER, before)
