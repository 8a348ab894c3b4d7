"""Threads that yield to the training steps, and those with normal priority, as the kernel reports them."""

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
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    thread.join()
    return answers[0]


def policy() -> int:
    return os.sched_getscheduler(0)


def slice_ns() -> int:
    """The time slice that the kernel gives the calling thread; 0 where it does not report one."""
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    attr = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None, use_errno=True).syscall(number, 0, attr, 48, 0) == 0
    time_slice: int = struct.unpack("=IIQiIQQQ", attr.raw)[5]
    return time_slice


def test_what_is_started_in_the_block_has_low_priority() -> None:
    with low_priority():
        assert in_a_thread(policy) == os.SCHED_BATCH
        result = subprocess.run([sys.executable, "-c", _PRINT_POLICY], capture_output=True, text=True, check=True)
        assert int(result.stdout) == os.SCHED_BATCH
    assert policy() == os.SCHED_OTHER
    assert in_a_thread(policy) == os.SCHED_OTHER


def test_a_thread_back_at_normal_priority_passes_it_to_its_helpers() -> None:
    def step() -> int:
        before = slice_ns()
        normal_priority()
        assert policy() == os.SCHED_OTHER
        assert slice_ns() in (before, 100_000_000)
        if tuple(map(int, platform.release().split(".")[:2])) >= (6, 12):
            assert slice_ns() == in_a_thread(slice_ns) == 100_000_000
        return in_a_thread(policy)

    with low_priority():
        assert in_a_thread(step) == os.SCHED_OTHER
        assert policy() == os.SCHED_BATCH  # the others keep low priority


def test_an_ordinary_thread_is_left_as_it_is() -> None:
    before = slice_ns()
    normal_priority()
    assert (policy(), slice_ns()) == (os.SCHED_OTHER, before)
