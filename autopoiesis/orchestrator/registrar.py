"""What an operator does to arms: the same on a running instance and on a stopped one."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import arm_from_source
from autopoiesis.arms.registry import Registry, RegistryError

LONGEST_NAME = 100

Say = Callable[[str, str], None]
"""Told of each thing done: its subject, and what was done, by whom and why."""


class Step(StrEnum):
    """What an operator can do to an arm."""

    PIN = "pin"
    UNPIN = "unpin"
    PROMOTE = "promote"
    RETIRE = "retire"
    QUARANTINE = "quarantine"


DONE = {
    Step.PIN: "pinned",
    Step.UNPIN: "unpinned",
    Step.PROMOTE: "promoted",
    Step.RETIRE: "retired",
    Step.QUARANTINE: "quarantined",
}


@dataclass(frozen=True, slots=True)
class Said:
    """Who gives an order, and why."""

    by: str
    why: str = ""

    def of(self, done: str) -> str:
        """Say in one line what was done."""
        told = f"{done} by {self.by or 'an operator'}" + (f": {self.why}" if self.why else "")
        return " ".join(told.split())


@dataclass(frozen=True, slots=True)
class NewArm:
    """A policy to take in, with what is known of it; its sources need not be in their normal form."""

    source: str
    """Its functions: fast ones, slow ones, or both."""
    name: str = ""
    origin: Origin = Origin.FILES
    created_at: float | None = None
    parents: tuple[str, ...] = ()
    thought: str = ""
    reason: str = ""
    canary: bool = False
    """Whether it is given traffic at once."""
    slow: str = ""
    """Its slow functions, where they do not stand in `source`."""
    prompt: str = ""
    answer: str = ""


class Registrar:
    """Changes arms on behalf of people. Raises what the registry raises; nothing is then changed."""

    def __init__(self, registry: Registry, say: Say, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._say = say
        self._clock = clock

    def add(self, new: NewArm, said: Said) -> tuple[Arm, bool]:
        """Take a policy in as candidate; return the arm, and whether it is new.

        A policy that is here already stays as it is: nothing is overwritten. Raises PolicyError.
        """
        arm = arm_from_source(
            new.source,
            name=" ".join(new.name.split())[:LONGEST_NAME],
            origin=new.origin,
            state=State.CANDIDATE,
            created_at=self._clock() if new.created_at is None else new.created_at,
            parents=new.parents,
            reason=said.of(new.reason or "added"),
            thought=new.thought,
            slow=new.slow,
            prompt=new.prompt,
            answer=new.answer,
        )
        known = {known.id for known in self._registry.all()}
        kept = self._registry.add(arm)
        if kept.id not in known:
            self._say(kept.name, f"{kept.state}: {kept.reason}")
        if new.canary and kept.state is not State.LIVE and kept.state is not State.CANARY:
            kept = self._move(kept, State.CANARY, said.of("given traffic"))
        return kept, kept.id not in known

    def step(self, which: str, step: Step, said: Said) -> Arm:
        """Do one step to an arm and return it. Raises RegistryError."""
        arm = self._registry.get(which)
        told = said.of(DONE[step])
        if step is Step.PIN or step is Step.UNPIN:
            change = self._registry.pin if step is Step.PIN else self._registry.unpin
            changed = change(arm.id)
            self._say(arm.name, told)
            return changed
        state = {Step.RETIRE: State.RETIRED, Step.QUARANTINE: State.QUARANTINED}.get(step)
        return self._move(arm, state or _next(arm), told)

    def _move(self, arm: Arm, state: State, reason: str) -> Arm:
        moved = self._registry.move(arm.id, state, reason)
        self._say(moved.name, f"{state}: {moved.reason}")
        return moved


def _next(arm: Arm) -> State:
    """Return the next state on the way to `live`: nothing becomes that without having been a canary."""
    if arm.state is State.LIVE:
        raise RegistryError(f"{arm.name} is live already; there is nothing above that")
    return State.LIVE if arm.state is State.CANARY else State.CANARY
