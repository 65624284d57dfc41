"""Who of the fleet is there: what replicas report, and who of them may have traffic."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autopoiesis.orchestrator.live_plans import LivePlans
from autopoiesis.orchestrator.spare import spare
from autopoiesis.replicas.fleet import FleetError, Member, read_fleet
from autopoiesis.replicas.limits import with_limits
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec

log = logging.getLogger(__name__)

READ_EVERY_S = 0.5

Say = Callable[[float, str, str, str], None]
"""Called with the time, the kind, the subject and the text of an event."""
Follow = Callable[[Sequence[Member]], None]


def specs_of(members: Sequence[Member]) -> tuple[ReplicaSpec, ...]:
    """Return the fleet as the twin models it before it has learned more."""
    return tuple(
        ReplicaSpec(m.name, with_limits(profile(m.profile), m.limits), m.speed) for m in members
    )


class FleetWatch:
    """The members of the fleet, and how each is."""

    def __init__(
        self,
        members: Sequence[Member],
        spec: Callable[[Member], ReplicaSpec],
        plans: LivePlans,
        say: Say,
        changed: Callable[[str], None],
        followers: Sequence[Follow] = (),
    ) -> None:
        """`spec` returns a member as the twin models it now.

        `changed` is told in a line that there is more or less capacity without our doing; `followers` are
        told who is in the fleet whenever that changes.
        """
        self.members = tuple(members)
        self._spec = spec
        self._plans = plans
        self._say = say
        self._changed = changed
        self._followers = (plans.follow, *followers)
        self._health: dict[str, bool] = {}
        self._samples: dict[str, ReplicaSample] = {}

    @property
    def specs(self) -> tuple[ReplicaSpec, ...]:
        """The fleet as the twin models it."""
        return tuple(map(self._spec, self.members))

    async def follow(self, file: Path) -> None:
        """Read the fleet file again and again until cancelled; one that cannot be read changes nothing."""
        trouble = ""
        while True:
            await asyncio.sleep(READ_EVERY_S)
            try:
                self.take(read_fleet(file))
            except FleetError as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("The fleet stays as it was: %s", error)

    def take(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        if tuple(members) == self.members:
            return
        before, after = {m.name: m for m in self.members}, {m.name: m for m in members}
        self.members = tuple(members)
        for follower in self._followers:
            follower(self.members)
        for kept in (self._health, self._samples):
            for name in [name for name in kept if name not in after]:
                del kept[name]
        for name, member in after.items():
            if name not in before:
                self._tell(name, f"{name} has joined the fleet")
            elif member.leaving and not before[name].leaving:
                self._tell(name, f"{name} is about to leave; it gets nothing new")
        for name in before.keys() - after.keys():
            self._tell(name, f"{name} has left the fleet")

    def _tell(self, name: str, told: str) -> None:
        self._say(time.time(), "replica", name, told)
        self._changed(told)

    def saw(self, sample: ReplicaSample) -> None:
        """Take in what a replica reports; say so where its health has changed."""
        name = sample.replica
        if name not in {member.name for member in self.members}:
            return
        self._samples[name] = sample
        changed = self._health.get(name, True) != sample.healthy
        self._health[name] = sample.healthy
        if changed and not self._plans.expected_away(name):
            now = "answers again" if sample.healthy else "does not answer; it gets no traffic"
            self._say(sample.at_s, "replica", name, f"{name} {now}")
            self._changed(f"{name} {now}")

    def able(self) -> tuple[ReplicaSpec, ...]:
        """Return the replicas that answer and are to have traffic; all if none does, since one may come back."""
        kept = self._plans.able(self.specs) or self.specs
        return tuple(spec for spec in kept if self._health.get(spec.name, True)) or kept

    def spare(self, open_requests: Sequence[OpenRequest], idle_below: float) -> Spare:
        """Tell whether the fleet has time to spare."""
        return spare(
            [m for m in self.members if m.serves],
            self._samples,
            tuple(open_requests),
            time.time(),
            idle_below,
        )
