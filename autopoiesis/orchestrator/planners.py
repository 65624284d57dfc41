"""Whose slow policy plans: the arm's own, or the one that stands in where an arm has none."""

from collections.abc import Callable

from autopoiesis.arms.registry import Registry
from autopoiesis.arms.sandbox.slow_arm import SlowArm
from autopoiesis.arms.seeds import SLOW_SEEDS, slow_seeds
from autopoiesis.arms.slow import verify_slow
from autopoiesis.orchestrator.plan_terms import Planner

NEVER = "never"
"""The slow seed that keeps the fleet as it is; nothing is run for it."""


def slow_names() -> tuple[str, ...]:
    """Return the names of the slow policies that may stand in."""
    return tuple(SLOW_SEEDS)


def planners(registry: Registry, stand_in: str = NEVER) -> Callable[[str], Planner | None]:
    """Return how to find an arm's slow policy, each in a sandbox of its own.

    Raises ValueError: no slow seed is called like the stand-in.
    """
    if stand_in not in SLOW_SEEDS:
        raise ValueError(f"there is no slow policy {stand_in!r}; there are {', '.join(SLOW_SEEDS)}")
    seed = next(s.policy for s in slow_seeds() if s.name == stand_in)

    def planner_of(arm_id: str) -> Planner | None:
        slow = registry.get(arm_id).slow
        if slow:
            return SlowArm(verify_slow(slow))
        return None if stand_in == NEVER else SlowArm(seed)

    return planner_of
