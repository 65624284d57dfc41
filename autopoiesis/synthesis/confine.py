"""What a synthesis worker gives up before it works: priority, its parent's fate, memory, files."""

import ctypes
import os
import resource
import signal
import sys

MEMORY_BYTES = 16 << 30
"""Address space; numba's compiler maps much more than it uses."""
CPU_S = 3600
FILE_BYTES = 64 << 20
"""Largest file it may write (compiled kernels are cached)."""
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
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 256),
    ):
        _, hard = resource.getrlimit(kind)
        wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (wanted, wanted))
