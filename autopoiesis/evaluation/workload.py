"""What there is to do for a slow policy, and a fleet at work on it."""

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, cast

from autopoiesis.arms.plan import Kind, Plan
from autopoiesis.evaluation.cluster import Batch, Cluster, Costs

FIRST_OUTPUT_TOKENS = 256.0
"""Mean output length that planners are told before any request has finished."""


class Spell(StrEnum):
    """What a stretch of time counts as."""

    SCHEDULING = "scheduling_s"
    STALE = "stale_s"
    RECONFIGURATION = "reconfiguration_s"
    SERVING = "serving_s"


class Instance(NamedTuple):
    """One replica."""

    kind: Kind
    ready_s: float


@dataclass(slots=True)
class State:
    """A fleet at work."""

    now_s: float = 0.0
    plan: Plan = field(default_factory=Plan)
    instances: tuple[Instance, ...] = ()
    phase: int = 0
    left: tuple[float, ...] = ()
    """Outstanding requests per model."""
    began_s: float = 0.0
    """When the phase began."""
    lasted_s: tuple[float, ...] = ()
    """How long the phases before took."""
    output_tokens: float = FIRST_OUTPUT_TOKENS
    """Mean output length of what finished in the last step in which something did."""
    changed_s: float = 0.0
    changed_steps: int = 0
    reschedulings: int = 0
    lost: int = 0
    gpus_before: dict[str, int] = field(default_factory=dict[str, int])
    spent: Counter[str] = field(default_factory=Counter[str])
    """Time by spell."""
    gpu_seconds: float = 0.0
    faults: int = 0

    def copy(self) -> "State":
        """Return a state that may go another way."""
        return replace(self, gpus_before=dict(self.gpus_before), spent=Counter(self.spent))


@dataclass(frozen=True, slots=True)
class Workload:
    """What there is to do, where, and at which costs."""

    cluster: Cluster
    batches: tuple[Batch, ...]
    costs: Costs


def done(work: Workload, state: State) -> bool:
    """Tell whether nothing is left."""
    return state.phase >= len(work.batches)


def parts_of(state: State) -> dict[str, float]:
    """Return the total time and its parts [s]."""
    spent = cast("dict[str, float]", state.spent)
    return {
        "total_s": state.now_s,
        **{spell.value: float(spent.get(spell, 0.0)) for spell in Spell},
    }
