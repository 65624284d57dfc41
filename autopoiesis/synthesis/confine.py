"""What a synthesis process gives up before it works: priority, its parent's fate, memory, files, network."""

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Collection

from autopoiesis.arms.sandbox.lockdown import set_limits

LIMITS = {
    "RLIMIT_CORE": 0,
    "RLIMIT_CPU": 3600,
    "RLIMIT_FSIZE": 64 << 20,  # compiled kernels are cached
    "RLIMIT_AS": 16 << 30,  # numba's compiler maps much more than it uses
    "RLIMIT_NOFILE": 256,
}
"""What a worker may use; in seconds, bytes and files."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
"""System calls; the same numbers on every architecture."""
_LANDLOCK_VERSION, _LANDLOCK_WITH_NETWORK = 1, 4
_BIND_TCP, _CONNECT_TCP, _RULE_NET_PORT = 1, 2, 2


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


def confine_network(ports: Collection[int]) -> bool:
    """Let this process open TCP connections to these ports only; tell whether that could be had.

    It needs Linux 6.7 (Landlock with network rules); elsewhere nothing changes.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION) < _LANDLOCK_WITH_NETWORK:
        return False
    handled = struct.pack("QQ", 0, _CONNECT_TCP | _BIND_TCP)
    ruleset = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    if ruleset < 0:
        return False
    try:
        for port in ports:
            rule = struct.pack("QQ", _CONNECT_TCP, port)
            if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_NET_PORT, rule, 0) != 0:
                return False
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)
