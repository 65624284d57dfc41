"""How much evolution and tuning may think, in units that do not depend on the machine.

A budget in seconds would make every result depend on what else the machine does. So time here is
counted in looks at the clock, of which there is one before each replay in the twin; the CPU that
this took is measured and reported beside it.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

TICK_S = 0.01
"""What one look at the counting clock takes [s]."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What one way of improving policies may spend."""

    past_replays: int = 6000
    """Replays for what is evolved, or for each arm that is tuned, on the past before the judged part."""
    cycle_replays: int = 4000
    """Replays of one synthesis cycle while serving."""
    cycle_s: float = 20.0
    """Simulated time from a cycle's beginning until its policies are there."""
    cooldown_s: float = 60.0
    """Simulated time between two cycles."""


def counting_clock() -> Callable[[], float]:
    """Return a clock that goes on by `TICK_S` at each look."""
    looks = 0

    def look() -> float:
        nonlocal looks
        looks += 1
        return looks * TICK_S

    return look


@dataclass(slots=True)
class Spent:
    """What thinking has cost a contestant."""

    cpu_s: float = 0.0
    replays: int = 0
    cycles: int = 0
    tokens: int = 0
    """Of language models; the genetic proposer takes none."""
    cost_usd: float = 0.0

    @contextmanager
    def thinking(self) -> Generator[None]:
        """Charge the CPU time of what runs inside."""
        began_s = time.process_time()
        try:
            yield
        finally:
            self.cpu_s += time.process_time() - began_s
