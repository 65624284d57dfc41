"""What a synthesis worker gives up before it works: priority, its parent's fate, memory, files."""

import ctypes
import os
import signal
import sys

from autopoiesis.arms.sandbox.lockdown import set_limits

LIMITS = {
    "RLIMIT_CORE": 0,
    "RLIMIT_CPU": 3600,
    "RLIMIT_FSIZE": 64 << 20,  # compiled kernels are cached
    "RLIMIT_AS": 16 << 30,  # numba's compiler maps much more than it uses
    "RLIMIT_NOFILE": 256,
}
"""What a worker may use; in seconds, bytes and files."""
_PR_SET_PDEATHSIG = 1


def confine() -> None:
    """Make this process harmless: lowest priority, own group, dead with its parent, limited.

    Linux ties a process to its parent; elsewhere the parent has to end it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    os.nice(19)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we could ask
            os.kill(os.getpid(), signal.SIGKILL)
    set_limits(LIMITS)
