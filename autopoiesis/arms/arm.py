"""An arm: one policy with its history. Arms are values; the registry replaces them."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Origin(StrEnum):
    """Who wrote the policy."""

    HUMAN = "human"
    GENETIC = "genetic"
    OPENAI = "openai"
    FLEET = "fleet"
    FILES = "files"
    TUNED = "tuned"


class State(StrEnum):
    """How far the policy has come."""

    CANDIDATE = "candidate"
    SHADOW = "shadow"
    CANARY = "canary"
    LIVE = "live"
    QUARANTINED = "quarantined"
    RETIRED = "retired"


SERVING = frozenset({State.CANARY, State.LIVE})
"""States in which an arm may receive traffic."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy, its origin and its state."""

    id: str
    """First 12 hex digits of the SHA-256 of the canonical source."""
    name: str
    origin: Origin
    state: State
    source: str
    """Canonical source of the policy."""
    created_at: float
    """Unix time [s]."""
    parents: tuple[str, ...] = ()
    reason: str = ""
    """Why it is in this state: one line."""
    pinned: bool = False
    thought: str = ""
    """What its author said of it."""
    slow: str = ""
    """Source of its slow functions, empty for none."""


def arm_id(policy_id: str, slow_id: str = "") -> str:
    """Return the id of an arm: its policy's, if it has no slow policy; else a hash of both ids."""
    if not slow_id:
        return policy_id
    return hashlib.sha256(f"{policy_id} {slow_id}".encode()).hexdigest()[:12]
