"""One request on its way through the gateway."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopoiesis.telemetry.records import OpenRequest

NO_BLOCKS: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class Flight:
    """A request from its arrival at the picker to its end. Times `_s` are on the state's clock."""

    key: str
    """The picker's own name of the request; comes back in the access log."""
    request_id: str
    """`x-request-id`: the client's or Envoy's."""
    path: str
    model: str
    stream: bool
    characters: int
    """Length of the prompt's text."""
    input_tokens: float
    max_output_tokens: float
    priority_class: float
    session: int
    shard: int
    arrived_s: float
    arrived_unix_s: float
    blocks: NDArray[np.int64] = field(default_factory=lambda: NO_BLOCKS)

    subset: frozenset[str] | None = None
    """Addresses among which it may be sent, None for all."""

    arm_id: str = ""
    window: int = -1
    replica: int = -1
    """Index of the replica it was sent to, -1 before."""
    dispatched_s: float = 0.0
    held_s: float = 0.0
    decision_s: float = 0.0
    uncached_tokens: float = 0.0
    context_tokens: float = 0.0
    answered: bool = False
    """Its first token was seen, or is taken to be out."""
    ttft_s: float | None = None
    progress_tokens: float = 0.0
    """Its replica's `Progress` when its first token came."""
    moved: bool = False
    """Another replica than the one it was sent to answered."""

    def as_open(self, replica: str, progress_tokens: float) -> OpenRequest:
        """Return what is known of it while it is under way.

        `replica` is where it was sent, `progress_tokens` that replica's `Progress` now.
        """
        came = round(max(progress_tokens - self.progress_tokens, 0.0))
        return OpenRequest(
            arrived_s=self.arrived_unix_s,
            shard=self.shard,
            input_tokens=round(self.input_tokens),
            max_output_tokens=round(self.max_output_tokens),
            session=self.session,
            priority_class=self.priority_class,
            replica=replica,
            first_token_s=None if self.ttft_s is None else self.arrived_unix_s + self.ttft_s,
            cached_tokens=self.cached_tokens,
            generated_tokens=-1 if self.ttft_s is None or not came else 1 + came,
            blocks=tuple(self.blocks.tolist()),
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens expected in the replica's prefix cache."""
        return round(max(self.input_tokens - self.uncached_tokens, 0.0)) if self.replica >= 0 else 0
