"""Why an allocation is what it is: one line for an operator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopoiesis.arms.allocation import Allocation
from autopoiesis.orchestrator.allocator import moved_shards

Name = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Grounds:
    """What was decided by."""

    order: str
    """What an operator has ordered, empty for nothing."""
    switchback: tuple[str, str] | None
    """The arms that take turns on the whole fleet: who is tried, and the control."""
    trial: str | None
    """The canary that is on trial."""
    probabilities: Mapping[str, float]
    """Of each arm, per cell; empty where nothing was drawn."""
    states: Mapping[str, str]
    """State of every arm."""


def explain(
    allocation: Allocation, previous: Allocation | None, grounds: Grounds, name: Name
) -> str:
    """Say who serves on how many replicas, what changed, and why."""
    held = {arm: len(allocation.group(arm)) for arm in allocation.arms()}
    most = sorted(held, key=lambda arm: -held[arm])
    parts = [", ".join(f"{name(arm)} on {held[arm]}" for arm in most)]
    moved = moved_shards(previous, allocation) if previous else 0
    if moved:
        parts.append(f"{moved} shards moved")
    return "; ".join(parts) + f" ({', '.join(_reasons(allocation, previous, grounds, name))})"


def _reasons(
    allocation: Allocation, previous: Allocation | None, grounds: Grounds, name: Name
) -> list[str]:
    reasons = [grounds.order] if grounds.order else []
    reasons += _fleet_changes(allocation, previous)
    before = set(previous.arms()) if previous else set[str]()
    reasons += [
        f"{name(arm)} is {state}"
        for arm in sorted(before)
        if (state := grounds.states.get(arm, "gone")) not in {"canary", "live"}
    ]
    if grounds.switchback:
        reasons.append("switchback of {} against {}".format(*map(name, grounds.switchback)))
    elif grounds.probabilities:
        reasons += _draw(allocation, previous, grounds, name)
    return reasons or ["shards follow the load"]


def _draw(
    allocation: Allocation, previous: Allocation | None, grounds: Grounds, name: Name
) -> list[str]:
    """Say what the draw changed: who leads now, who challenges, who does no more."""
    p = grounds.probabilities
    leader = _leader(allocation)
    reasons: list[str] = []
    if previous is None or leader != _leader(previous):
        reasons.append(f"{name(leader)} leads, p={p.get(leader, 0.0):.2f}")
    for arm in allocation.arms():
        if arm == leader or (previous and arm in previous.arms() and arm != _leader(previous)):
            continue
        role = "is on trial" if arm == grounds.trial else "challenges"
        reasons.append(f"{name(arm)} {role}, p={p.get(arm, 0.0):.2f}")
    gone = [a for a in (previous.arms() if previous else ()) if a not in allocation.arms()]
    serving = [a for a in gone if grounds.states.get(a) in {"canary", "live"}]
    return reasons + (
        [f"{', '.join(map(name, serving))} gave way"] if serving and not reasons else []
    )


def _fleet_changes(allocation: Allocation, previous: Allocation | None) -> list[str]:
    if previous is None:
        return []
    old, new = ({r for cell in a.cells for r in cell.replicas} for a in (previous, allocation))
    changes = ((old - new, "left"), (new - old, "joined"))
    return [f"{', '.join(sorted(names))} {what}" for names, what in changes if names]


def _leader(allocation: Allocation) -> str:
    return max(allocation.arms(), key=allocation.share)
