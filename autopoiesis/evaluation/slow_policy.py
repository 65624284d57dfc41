"""A slow policy's functions in this process: what it wants, and the CPU time that this took."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autopoiesis.arms.migration import Order
from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.slow import SlowPolicy
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures


class Answer(NamedTuple):
    """What a policy wants, and what it took to find out."""

    plan: Plan | None
    """None: stay."""
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """A slow policy's functions in this process, and how far its changes go."""

    name: str
    should_reschedule: Callable[[WindowFeatures, FleetFeatures, Plan], bool]
    schedule: Callable[[WindowFeatures, FleetFeatures, Plan], Plan]
    order: Order = Order.MINIMAL
    known: dict[Hashable, Answer] = field(default_factory=dict[Hashable, Answer], compare=False)
    """What its planner answered before, and what that took."""

    def decide(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer:
        """Ask the policy; a failure keeps the plan, and its time counts."""
        began_s = time.process_time()
        wanted: Plan | None = None
        try:
            if self.should_reschedule(window, fleet, plan):
                wanted = self.schedule(window, fleet, plan)
        except Exception:
            wanted = None
        return Answer(wanted, time.process_time() - began_s)

    def imagine(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer:
        """Ask the policy in a trial run: near-equal questions to its planner are answered from memory.

        What the planner took the first time is charged each time.
        """
        try:
            if not self.should_reschedule(window, fleet, plan):
                return Answer(None, 0.0)
        except Exception:
            return Answer(None, 0.0)
        demand = tuple((round(d.arrival_rate_rps, -1), *map(_rough, d[2:])) for d in window.demand)
        question = demand, tuple((g.name, g.available) for g in fleet.gpus), fleet.lost > 0, plan
        if question not in self.known:
            began_s = time.process_time()
            try:
                wanted = self.schedule(window, fleet, plan)
            except Exception:
                wanted = None
            self.known[question] = Answer(wanted, time.process_time() - began_s)
        return self.known[question]


def _rough(value: float) -> float:
    return float(f"{value:.2g}")


def loaded(policy: SlowPolicy, name: str, order: Order = Order.MINIMAL) -> Loaded:
    """Load a verified slow policy into this process.

    Only for policies that this package composes of its own seeds and of numbers: what others
    wrote belongs into the sandbox.
    """
    names: dict[str, Any] = {"Plan": Plan, "ReplicaGroup": ReplicaGroup}
    exec(compile(policy.source, name, "exec"), names)  # noqa: S102
    return Loaded(name, names["should_reschedule"], names["schedule"], order)
