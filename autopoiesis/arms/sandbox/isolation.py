"""How well a process is shut off from the machine."""

from enum import StrEnum


class Isolation(StrEnum):
    """What holds a process back, weakest first."""

    NONE = "none"
    """Nothing but being a process of its own, with an empty environment."""
    RLIMITS = "rlimits"
    """Limits on CPU, memory and files. It can still read files and reach the network."""
    SECCOMP = "seccomp"
    """Also a filter of system calls. It can still read files."""
    LANDLOCK = "landlock"
    """Also no files but its own libraries, no TCP. It can still start processes and send UDP."""
    FULL = "landlock+seccomp"
    """Both: it computes and answers."""

    @property
    def level(self) -> int:
        """Rank as a number, for metrics: 0 for none up to 4 for both."""
        return list(Isolation).index(self)
