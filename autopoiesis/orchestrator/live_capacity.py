"""The replicas of a running instance as places of a plan.

The controller decides what each replica is to do, and writes it into the target file; the supervisor, whose
children the replicas are, follows it and says in the change log what came of it. A replica that is to stop,
sleep or restart gets no more traffic from the next allocation on, and is told once nothing is in flight there.
Of replicas that run elsewhere only the traffic is ours: stopped, they get none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from autopoiesis.arms.migration import Action, Step
from autopoiesis.orchestrator.capacity import Slot, Standing, kinds_of, slot_for
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.limits import Limits, with_limits
from autopoiesis.replicas.targets import Target, TargetFile, Want
from autopoiesis.telemetry.records import Reconfiguration, ReplicaSample
from autopoiesis.twin.simulation import ReplicaSpec

QUIET_S = 1.0
"""How long nothing must have been in flight at a draining replica before it is told to go."""

SpecOf = Callable[[Member], ReplicaSpec]


class LiveBackend:
    """Changes replicas through the supervisor; `saw` tells it what they report, `heard` what was done."""

    def __init__(self, members: Sequence[Member], spec: SpecOf, targets: TargetFile) -> None:
        """`spec` returns a member as the twin models it."""
        self.members: dict[str, Member] = {}
        self._spec = spec
        self._file = targets
        self._targets = targets.read()
        self._draining: dict[str, float | None] = {}
        """Since when nothing has been in flight there."""
        self._then: dict[str, Target] = {}
        """What a draining replica is to do once it is empty."""
        self._drained: dict[str, tuple[float, float]] = {}
        """When a replica began to drain, and how long that took."""
        self._coming: dict[str, bool] = {}
        """Replicas that start, and whether the supervisor has said that they are up."""
        self._healthy: dict[str, bool] = {}
        self.follow(members)

    # --- what it is -----------------------------------------------------------------------------

    def slots(self) -> tuple[Slot, ...]:
        """Return every replica with what it does now."""
        members = list(self.members.values())
        specs = [self._as_targeted(m) for m in members]
        return tuple(
            Slot(spec, kind, self.standing(member.name), member.kind != "remote", member.leaving)
            for spec, kind, member in zip(specs, kinds_of(specs), members, strict=True)
        )

    def _as_targeted(self, member: Member) -> ReplicaSpec:
        """Return the replica with the limits that it has, or is to have once it is up."""
        spec = self._spec(member)
        limits = self.target(member.name).limits
        return replace(spec, profile=with_limits(spec.profile, limits))

    def target(self, name: str) -> Target:
        """Return what a replica is to do."""
        return self._targets.get(name, Target())

    def standing(self, name: str) -> Standing:
        """Return what a replica does now."""
        if name not in self.members:
            return Standing.LOST
        member, target = self.members[name], self.target(name)
        if target.want is not Want.ON:
            goes = member.kind != "remote" and member.serves
            return Standing.DRAINING if goes else Standing.OFF
        if name in self._draining:
            return Standing.DRAINING
        if name in self._coming or not member.serves:
            return Standing.STARTING
        return Standing.READY if self._healthy.get(name, True) else Standing.LOST

    def takes_traffic(self, name: str) -> bool:
        """Tell whether a replica is to have traffic, if it answers."""
        there = self.standing(name) in {Standing.READY, Standing.LOST}
        return there and not self.members[name].leaving

    def expected_away(self, name: str) -> bool:
        """Tell whether it is no fault that the replica does not answer."""
        away = {Standing.OFF, Standing.STARTING, Standing.DRAINING}
        return name not in self.members or self.standing(name) in away

    @property
    def moving(self) -> tuple[str, ...]:
        """The replicas that are being changed."""
        moving = {Standing.STARTING, Standing.DRAINING}
        return tuple(name for name in self.members if self.standing(name) in moving)

    def draining(self) -> dict[str, Target]:
        """Return the replicas that drain, and what they are to do then."""
        return {name: self._then[name] for name in self._draining}

    # --- what changes it ------------------------------------------------------------------------

    def follow(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        self.members = {member.name: member for member in members}
        for kept in (self._draining, self._then, self._coming, self._healthy):
            for name in [name for name in kept if name not in self.members]:
                del kept[name]

    def carry_out(self, step: Step) -> str:
        """Begin a step; raises StepError if no replica stands so that it could, OSError if it cannot be told."""
        slot = slot_for(self.slots(), step)
        name, target = slot.spec.name, self.target(slot.spec.name)
        if step.action is Action.START:
            if slot.kind != step.kind:
                kind = step.kind
                limits = Limits(kind.max_num_seqs, kind.max_num_batched_tokens)
                target = replace(target, limits=limits.over(target.limits))
            self.tell(name, replace(target, want=Want.ON))
        else:
            away = Want.ASLEEP if self.members[name].sleeps else Want.OFF
            lost = slot.standing is Standing.LOST
            self.tell(name, replace(target, want=Want.OFF if lost else away), drain=not lost)
        return name

    def tell(self, name: str, target: Target, *, drain: bool = False) -> None:
        """Let a replica do something, if `drain` once it is empty. Raises OSError."""
        if drain:
            self._draining[name], self._then[name] = None, target
            return
        self._file.write(self._targets | {name: target})
        self._targets[name] = target
        if target.want is Want.ON and self.members[name].kind != "remote":
            self._coming[name] = False

    def go_on_draining(self, draining: Mapping[str, Target]) -> None:
        """Take up again what another controller had begun."""
        for name, target in draining.items():
            if name in self.members and self.standing(name) is Standing.READY:
                self.tell(name, target, drain=True)

    def saw(self, samples: Sequence[ReplicaSample], serving: Mapping[str, int]) -> None:
        """Take in what replicas report; `serving` counts the cells that still feed each of them."""
        for sample in samples:
            name = sample.replica
            if name not in self.members:
                continue
            self._healthy[name] = sample.healthy
            # What is restarted may still report its old self's health until it is said to be up.
            if sample.healthy and self._coming.get(name):
                del self._coming[name]
            if name in self._draining:
                self._drain(sample, serving.get(name, 0) > 0)

    def _drain(self, sample: ReplicaSample, is_fed: bool) -> None:
        name = sample.replica
        began_s, _ = self._drained.setdefault(name, (sample.at_s, 0.0))
        busy = sample.in_flight > 0 or is_fed
        since_s = self._draining[name]
        self._draining[name] = None if busy else (since_s or sample.at_s)
        if since_s is not None and not busy and sample.at_s - since_s >= QUIET_S:
            self._drained[name] = (began_s, sample.at_s - began_s)
            self.tell(name, self._then[name])
            del self._draining[name], self._then[name]

    def heard(self, change: Reconfiguration) -> Reconfiguration:
        """Take in that the supervisor has changed a replica; return that with how long it drained before."""
        name = change.replica
        _, drain_s = self._drained.pop(name, (0.0, 0.0))
        if change.error:
            was = Limits(change.max_num_seqs, change.max_num_batched_tokens, change.tensor_parallel)
            want = Want.OFF if change.action == "start" else Want.ON
            self.tell(name, replace(self.target(name), want=want, limits=was))
        if name in self._coming:
            self._coming[name] = True
        return replace(change, drain_s=drain_s)
