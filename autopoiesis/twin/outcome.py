"""What became of each request of a simulated trace."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Status(IntEnum):
    """How a request stands."""

    PENDING = 0
    COMPLETED = 1
    SHED = 2
    """Refused by the policy, or by a full queue."""
    FAILED = 3
    """It could never fit into its replica's KV cache, or the replica was lost while it streamed."""
    ABORTED = 4
    """Its client gave up waiting for the first token."""


LOST = (Status.FAILED, Status.ABORTED)
"""Admitted, and still not served."""


class Outcome(NamedTuple):
    """One entry per request, in order of arrival; times are NaN where they never came."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    shard: Ints
    cell: Ints
    """The cell that decided, counted over all `allocate` calls; -1 undecided."""
    replica: Ints
    """-1 if never dispatched."""
    dispatched_s: Floats
    first_token_s: Floats
    finished_s: Floats
    status: Ints
    """Values of `Status`."""
    cached_tokens: Ints
    """Prompt tokens that the replica had cached."""
    generated_tokens: Ints
    """Tokens that have come so far; -1 where nobody has counted yet."""

    @property
    def ttft_s(self) -> Floats:
        """Return the times to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Return the mean times per output token after the first; NaN for a single token."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (self.finished_s - self.first_token_s) / (self.output_tokens - 1)
        return np.where(self.output_tokens > 1, mean, np.nan)

    @property
    def e2e_s(self) -> Floats:
        """Return the times from arrival to the last token; NaN unless completed."""
        return np.where(self.status == Status.COMPLETED, self.finished_s - self.arrival_s, np.nan)

    def select(self, mask: NDArray[np.bool_] | Ints | slice) -> "Outcome":
        """Return the chosen entries."""
        columns = {name: column[mask] for name, column in self._asdict().items()}
        return self._replace(**columns)
