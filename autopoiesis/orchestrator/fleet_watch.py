"""Who of the fleet is there: what replicas report, and who of them may have traffic."""

import time
from collections.abc import Callable, Sequence

from autopoiesis.orchestrator.live_plans import LivePlans
from autopoiesis.orchestrator.spare import spare
from autopoiesis.replicas.fleet import Member
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec

Say = Callable[[float, str, str, str], None]
"""Called with the time, the kind, the subject and the text of an event."""


def specs_of(members: Sequence[Member]) -> tuple[ReplicaSpec, ...]:
    """Return the fleet as the twin models it before it has learned more."""
    return tuple(ReplicaSpec(m.name, profile(m.profile), m.speed) for m in members)


class FleetWatch:
    """The members of the fleet, and how each is."""

    def __init__(
        self,
        members: Sequence[Member],
        spec: Callable[[Member], ReplicaSpec],
        plans: LivePlans,
        say: Say,
    ) -> None:
        """`spec` returns a member as the twin models it now."""
        self.members = tuple(members)
        self._spec = spec
        self._plans = plans
        self._say = say
        self._health: dict[str, bool] = {}
        self._samples: dict[str, ReplicaSample] = {}

    @property
    def specs(self) -> tuple[ReplicaSpec, ...]:
        """The fleet as the twin models it."""
        return tuple(map(self._spec, self.members))

    def saw(self, sample: ReplicaSample) -> None:
        """Take in what a replica reports; say so where its health has changed."""
        name = sample.replica
        self._samples[name] = sample
        changed = self._health.get(name, True) != sample.healthy
        self._health[name] = sample.healthy
        if changed and not self._plans.expected_away(name):
            now = "answers again" if sample.healthy else "does not answer; it gets no traffic"
            self._say(sample.at_s, "replica", name, f"{name} {now}")

    def able(self) -> tuple[ReplicaSpec, ...]:
        """Return the replicas that answer and that the plan keeps; all if none does, since one may come back."""
        kept = self._plans.able(self.specs) or self.specs
        return tuple(spec for spec in kept if self._health.get(spec.name, True)) or kept

    def spare(self, open_requests: Sequence[OpenRequest], idle_below: float) -> Spare:
        """Tell whether the fleet has time to spare."""
        return spare(self.members, self._samples, tuple(open_requests), time.time(), idle_below)
