"""From one plan to another: what starts, stops and restarts, and in which order."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from autopoiesis.arms.plan import Kind, Plan


class Reload(NamedTuple):
    """A replica that becomes another on the same GPUs: stopped, then started anew."""

    old: Kind
    new: Kind


@dataclass(frozen=True, slots=True)
class Differences:
    """What it takes to get from one plan to another. Replicas are counted, groups do not matter."""

    keep: Counter[Kind]
    """Replicas that run on as they are."""
    stop: Counter[Kind]
    """Replicas whose GPUs are given up, or used in another shape."""
    start: Counter[Kind]
    """Replicas that come up on free GPUs."""
    reload: Counter[Reload]
    """Replicas that come up where another of the same width on the same type of GPU ran."""
    shares: bool
    """Whether traffic is split in another way among groups."""

    @property
    def total(self) -> int:
        """Replicas that start, stop or reload."""
        return self.stop.total() + self.start.total() + self.reload.total()


def differences(old: Plan, new: Plan) -> Differences:
    """Tell what the two plans differ in."""
    before, after = old.kinds(), new.kinds()
    stop, start = before - after, after - before
    reload = Counter[Reload]()
    for going in sorted(stop):
        for coming in sorted(start, key=lambda kind: (kind.model != going.model, kind)):
            if (going.gpu, going.tensor_parallel) == (coming.gpu, coming.tensor_parallel):
                count = min(stop[going], start[coming])
                reload[Reload(going, coming)] += count
                stop[going] -= count
                start[coming] -= count
    return Differences(before & after, +stop, +start, +reload, _shares(old) != _shares(new))


class Action(StrEnum):
    """What a step does."""

    STOP = "stop"
    """Drain the replica, then stop it."""
    START = "start"
    """Start a replica and wait until it is ready."""


class Step(NamedTuple):
    """One replica that goes or comes."""

    action: Action
    kind: Kind


class Order(StrEnum):
    """How far a change goes."""

    FULL = "full"
    """Everything stops, then everything of the new plan starts."""
    MINIMAL = "minimal"
    """What both plans have runs on; a replica stops only when its GPUs are needed or at the end."""


def migration(
    old: Plan, new: Plan, available: Mapping[str, int], order: Order = Order.MINIMAL
) -> tuple[Step, ...]:
    """Return the steps from the old plan to the new one, in order.

    `available` are the GPUs by type that either plan may use. In minimal order as many replicas as
    possible serve at any time: while GPUs are free, start; else stop one replica to make room, of the
    model that has most to spare. Raises ValueError if the new plan does not fit.
    """
    for gpu, used in new.gpus().items():
        if used > available.get(gpu, 0):
            raise ValueError(
                f"the plan uses {used} {gpu}, of which {available.get(gpu, 0)} are available"
            )
    if order == Order.FULL:
        if not differences(old, new).total:
            return ()
        stops = [Step(Action.STOP, kind) for kind in sorted(old.kinds().elements())]
        return (*stops, *(Step(Action.START, kind) for kind in sorted(new.kinds().elements())))
    before, after = old.kinds(), new.kinds()
    going, coming = before - after, after - before
    running = Counter(before)
    free = Counter(available)
    free.subtract(old.gpus())
    steps: list[Step] = []
    for kind in _fewest_first(coming, running):
        while free[kind.gpu] < kind.tensor_parallel:
            leaving = _most_to_spare(going, running, kind.gpu)
            steps.append(Step(Action.STOP, leaving))
            free[leaving.gpu] += leaving.tensor_parallel
            going[leaving] -= 1
            running[leaving] -= 1
        steps.append(Step(Action.START, kind))
        free[kind.gpu] -= kind.tensor_parallel
        running[kind] += 1
    return (*steps, *(Step(Action.STOP, kind) for kind in sorted(going.elements())))


def _shares(plan: Plan) -> dict[Kind, float]:
    shares: dict[Kind, float] = {}
    for group in plan.groups:
        shares[group.kind] = round(shares.get(group.kind, 0.0) + group.share, 9)
    return shares


def _of_model(running: Counter[Kind], model: str) -> int:
    return sum(count for kind, count in running.items() if kind.model == model)


def _fewest_first(coming: Counter[Kind], running: Counter[Kind]) -> list[Kind]:
    """Order what starts so that the model with the fewest replicas comes first, each time."""
    ahead, counts = Counter(coming), Counter[str]()
    for kind, count in running.items():
        counts[kind.model] += count
    ordered: list[Kind] = []
    while ahead.total():
        kind = min(+ahead, key=lambda kind: (counts[kind.model], kind))
        ordered.append(kind)
        ahead[kind] -= 1
        counts[kind.model] += 1
    return ordered


def _most_to_spare(going: Counter[Kind], running: Counter[Kind], gpu: str) -> Kind:
    candidates = [kind for kind, count in going.items() if count > 0 and kind.gpu == gpu]
    return max(candidates, key=lambda kind: (_of_model(running, kind.model), kind))
