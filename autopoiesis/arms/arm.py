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


class Kind(StrEnum):
    """What a policy decides."""

    FAST = "fast"
    """Where requests go."""
    SLOW = "slow"
    """When the fleet is rescheduled and into what plan."""
    BOTH = "both"


SERVING = frozenset({State.CANARY, State.LIVE})
"""States in which an arm may receive traffic, or be asked for plans."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy, its origin and its state."""

    id: str
    """First 12 hex digits of a SHA-256: see `arm_id`."""
    name: str
    origin: Origin
    state: State
    source: str
    """Canonical source of its fast functions, empty for none."""
    created_at: float
    """Unix time [s]."""
    parents: tuple[str, ...] = ()
    reason: str = ""
    """Why it is in this state: one line."""
    pinned: bool = False
    thought: str = ""
    """What its author said of it."""
    slow: str = ""
    """Normalised source of its slow functions, empty for none."""
    prompt: str = ""
    """What the language model that wrote it was asked, empty if none did."""
    answer: str = ""
    """What the model answered."""

    @property
    def kind(self) -> Kind:
        """What it decides."""
        if not self.slow:
            return Kind.FAST
        return Kind.BOTH if self.source else Kind.SLOW

    @property
    def serves(self) -> bool:
        """Whether it may receive traffic."""
        return self.state in SERVING and self.source != ""

    @property
    def plans(self) -> bool:
        """Whether it may be asked for plans."""
        return self.state in SERVING and self.slow != ""

    @property
    def slow_id(self) -> str:
        """Id of its slow policy, empty for none."""
        return text_id(self.slow) if self.slow else ""

    @property
    def text(self) -> str:
        """All of its source."""
        return "\n\n".join(part for part in (self.source, self.slow) if part)


def text_id(text: str) -> str:
    """Return the first 12 hex digits of the SHA-256 of a policy's text, which is plain ASCII."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def arm_id(policy_id: str, slow_id: str = "") -> str:
    """Return the id of an arm: that of its only policy, or a hash of the ids of both."""
    if policy_id and slow_id:
        return text_id(f"{policy_id} {slow_id}")
    return policy_id or slow_id
