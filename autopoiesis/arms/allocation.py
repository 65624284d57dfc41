"""Who serves what for one window: cells, and the shards of traffic that feed them.

A cell is a group of replicas with one arm for one window. Never two arms on one replica in one
window: an arm would be rewarded for the capacity it takes from the other.
"""

from dataclasses import dataclass

SHARDS = 64
"""Traffic is cut into this many shards; a shard is a hash of session, prefix root or request id."""

ROOT_TOKENS = 1024
"""A prompt's root, which keeps a conversation in its shard, is its first tokens. Few are not enough: often
all prompts begin with one system prompt (in Mooncake's conversations all have the first 512 in common)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one group of replicas, fed by some shards."""

    arm_id: str
    replicas: tuple[str, ...]
    shards: tuple[int, ...]
    propensity: float = 1.0
    """Probability with which this arm was drawn for this cell."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The cells of one window. Cells of one arm route as one group."""

    window: int
    cells: tuple[Cell, ...]

    def arms(self) -> tuple[str, ...]:
        """Return the ids of the arms that serve, each once, in cell order."""
        return tuple(dict.fromkeys(cell.arm_id for cell in self.cells))

    def share(self, arm_id: str) -> float:
        """Return the share of shards [0..1] that the arm serves."""
        return sum(len(c.shards) for c in self.cells if c.arm_id == arm_id) / SHARDS

    def group(self, arm_id: str) -> tuple[str, ...]:
        """Return the replicas of all cells of the arm."""
        return tuple(r for c in self.cells if c.arm_id == arm_id for r in c.replicas)


def shard_of(key: int) -> int:
    """Return the shard of a hashed session, prefix root or request id (Fibonacci hashing)."""
    return ((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF) >> 58
