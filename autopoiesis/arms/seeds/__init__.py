"""The arms that people wrote: what routers do today, and the baselines to beat."""

from dataclasses import dataclass
from importlib.resources import files

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import arm_from_source
from autopoiesis.arms.language import thought_of
from autopoiesis.arms.slow import SlowPolicy, verify_slow


def seed_arms() -> tuple[Arm, ...]:
    """Return the human arms that decide on requests, live, in the order of their names."""
    found = [file for file in files(__name__).iterdir() if file.name.endswith(".policy")]
    return tuple(
        _seed(file.name.removesuffix(".policy"), file.read_text("ascii"))
        for file in sorted(found, key=lambda file: file.name)
    )


def slow_seed_arms() -> tuple[Arm, ...]:
    """Return the human arms that decide on plans, live: `slow_seeds` as arms without fast functions."""
    return tuple(_seed(s.name, s.policy.source, s.thought) for s in slow_seeds())


def _seed(name: str, source: str, thought: str = "") -> Arm:
    return arm_from_source(
        source,
        name=name,
        origin=Origin.HUMAN,
        state=State.LIVE,
        created_at=0.0,
        reason="written by people; always in the pool",
        thought=thought,
    )


SLOW_SEEDS = {
    "never": ("once", "milp"),
    "periodic": ("periodic", "greedy"),
    "threshold": ("threshold", "minimal"),
    "amortised": ("amortised", "greedy"),
    "greedy": ("always", "greedy"),
    "milp": ("threshold", "milp"),
    "full-migration": ("capacity", "milp"),
    "minimal-migration": ("capacity", "minimal"),
}
"""Slow seeds: name → its trigger (when) and its planner (what), files in those folders."""


@dataclass(frozen=True, slots=True)
class SlowSeed:
    """A slow policy that people wrote."""

    name: str
    policy: SlowPolicy
    thought: str
    """Where it comes from: what its trigger and its planner say of themselves."""


def slow_seeds() -> tuple[SlowSeed, ...]:
    """Return the human slow policies, each composed of a trigger and a planner."""
    found: list[SlowSeed] = []
    for name, (trigger, planner) in SLOW_SEEDS.items():
        thought = (
            f"{thought_of(_text('triggers', trigger))}\n{thought_of(_text('planners', planner))}"
        )
        found.append(SlowSeed(name, verify_slow(slow_seed_text(trigger, planner)), thought))
    return tuple(found)


def slow_seed_text(trigger: str, planner: str) -> str:
    """Compose a slow policy of a trigger and a planner, by the names of their files."""
    return f"{_text('planners', planner)}\n\n{_text('triggers', trigger)}"


def _text(folder: str, name: str) -> str:
    return (files(__name__) / folder / f"{name}.py").read_text("ascii")
