"""How a process shuts itself off, as far as the kernel lets it."""

import os
import resource
import sys
from collections.abc import Iterable, Mapping

from autopoiesis.arms.sandbox import kernel
from autopoiesis.arms.sandbox.isolation import Isolation

NICENESS = 10
"""What it computes may wait for requests."""

# Names of limits, where the platform has them; values are the most that the process may use.
NOTHING_OUTSIDE = {
    "RLIMIT_CORE": 0,
    "RLIMIT_FSIZE": 0,
    "RLIMIT_NPROC": 0,
    "RLIMIT_MEMLOCK": 0,
    "RLIMIT_MSGQUEUE": 0,
    "RLIMIT_SIGPENDING": 0,
    "RLIMIT_NOFILE": 32,
}


def set_limits(limits: Mapping[str, int]) -> None:
    """Lower limits of this process, soft and hard, by their names in `resource`; none is raised."""
    for name, limit in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (lowest, lowest))


def lock_down(readable: Iterable[str], memory_bytes: int) -> tuple[Isolation, str]:
    """Shut this process off for good; return how well it worked and what did not.

    It keeps its open files, and may read what lies beneath `readable`. Call it with one thread, after
    all imports that need more.
    """
    os.nice(NICENESS)
    set_limits({**NOTHING_OUTSIDE, "RLIMIT_AS": memory_bytes})
    if sys.platform != "linux":
        return Isolation.RLIMITS, f"{sys.platform} has neither Landlock nor seccomp"
    try:
        if (threads := len(os.listdir("/proc/self/task"))) != 1:  # noqa: PTH208
            return Isolation.RLIMITS, f"{threads} threads run, and only one would be held"
        kernel.give_up_privileges()
    except OSError as error:
        return Isolation.RLIMITS, str(error)
    faults: list[str] = []
    for shut in (lambda: kernel.close_files(readable), kernel.filter_calls):
        try:
            shut()
            faults.append("")
        except OSError as error:
            faults.append(str(error))
    return _REACHED[not faults[0], not faults[1]], "; ".join(filter(None, faults))


_REACHED = {
    (True, True): Isolation.FULL,
    (True, False): Isolation.LANDLOCK,
    (False, True): Isolation.SECCOMP,
    (False, False): Isolation.RLIMITS,
}
