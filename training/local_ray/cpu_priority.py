"""Who has the cores of this machine: the steps of training come before the processes that Ray runs beside them.

The threads of a step wait for each other, so one that is interrupted for a moment stops all of them, and a Ray of one
machine wakes up some thousand times a second. `training.ray_train.fit` starts it from a thread that stands back, which
its processes inherit; `training.ray_train.worker` steps forward again for the steps. Needs no privileges. Linux only:
elsewhere nothing happens.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator

_SLICE_NS = 100_000_000  # the longest that Linux grants
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # Linux's include/uapi/asm-generic/unistd.h, and x86's table
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period: sched(7)


@contextlib.contextmanager
def low_priority() -> Iterator[None]:
    """Threads and processes that are started in the block wait for others' turns to end when they wake up.

    They keep their share of the cores (SCHED_BATCH, not SCHED_IDLE): what they have to do is done, if a little later.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def normal_priority() -> None:
    """Give the calling thread, if it stands back, and those that it starts from now on ordinary turns again, long ones
    where the kernel grants them (Linux 6.12 and later; earlier ones leave them as they are)."""
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_BATCH:
        return
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    number = _SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attr, 0)  # a refusal leaves the turns as they are
