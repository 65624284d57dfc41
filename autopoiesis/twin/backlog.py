"""Where a fleet's requests are when a simulation begins."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.machine import Program
from autopoiesis.twin.python_policy import PythonPolicy

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Backlog(NamedTuple):
    """Where each of a trace's n requests is at time 0; it says something of those that arrived before."""

    replica: Ints
    """(n,): the replica that it was sent to, -1 if none."""
    generated_tokens: Ints
    """(n,): tokens that were out, fewer than it generates in all; 0 before the first."""
    first_token_s: Floats
    """(n,): when the first one was out; not used where none was."""
    held_by: Ints
    """(n,): who of `holders` holds it where it is at no replica; -1: whoever serves its shard."""
    holders: tuple[Program | PythonPolicy, ...] = ()

    def resized(self, count: int) -> "Backlog":
        """Return the same for a trace cut off, or that goes on, at `count` requests."""
        more = max(count - len(self.replica), 0)
        return Backlog(
            np.append(self.replica[:count], np.full(more, -1)),
            np.append(self.generated_tokens[:count], np.zeros(more, np.int64)),
            np.append(self.first_token_s[:count], np.full(more, np.nan)),
            np.append(self.held_by[:count], np.full(more, -1)),
            self.holders,
        )


def no_backlog(requests: int) -> Backlog:
    """Return the backlog of a fleet in which nothing was going on."""
    nothing = np.full(requests, -1, np.int64)
    return Backlog(nothing, np.zeros(requests, np.int64), np.full(requests, np.nan), nothing.copy())
