"""CPU priority: Ray's processes yield to the training threads (SCHED_BATCH).

The threads of a training step wait for each other, so interrupting one stalls all of them, and a Ray on one machine
wakes up about a thousand times a second. A private Ray is started at low priority, which its processes inherit; the
training thread returns to normal priority. Needs no privileges. Linux only: elsewhere it does nothing.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator

_SLICE_NS = 100_000_000  # the longest that Linux allows
_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # Linux's include/uapi/asm-generic/unistd.h, and x86's table
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period: sched(7)


@contextlib.contextmanager
def low_priority() -> Iterator[None]:
    """In the block, this thread and the threads and processes that it starts do not preempt others on wake-up.

    They keep their share of the CPU (SCHED_BATCH, not SCHED_IDLE): their work is done, if a little later.
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
    """Return the calling thread from low to normal priority, also for threads that it starts later.

    On Linux 6.12 and later they also get long time slices; earlier kernels ignore that.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_BATCH:
        return
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    number = _SYS_SCHED_SETATTR.get(platform.machine())
    if number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attr, 0)  # if refused, slices keep their length
