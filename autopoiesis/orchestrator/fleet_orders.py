"""What an operator orders of replicas: stop, start, restart with other limits, sleep, wake. One at a time.

An order for several replicas is a rolling one: each drains, changes, and serves again before the next one is
touched, and never do fewer than the minimum serve. If one does not come up again, the rest is left as it is.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from autopoiesis.orchestrator.capacity import Slot, Standing
from autopoiesis.orchestrator.live_capacity import LiveBackend
from autopoiesis.orchestrator.rails import OrderError
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.targets import Want
from autopoiesis.telemetry.records import Reconfiguration

Say = Callable[[str, str], None]
"""Called with a replica's name and what an operator should know of it."""


class FleetOrder(StrEnum):
    """What can be ordered of a replica."""

    RESTART = "restart"
    STOP = "stop"
    START = "start"
    SLEEP = "sleep"
    WAKE = "wake"


TAKES_AWAY = frozenset({FleetOrder.RESTART, FleetOrder.STOP, FleetOrder.SLEEP})
WANTED = {FleetOrder.STOP: Want.OFF, FleetOrder.SLEEP: Want.ASLEEP}


class _Task(NamedTuple):
    order: FleetOrder
    name: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class FleetCommand:
    """One order, for some replicas or (none named) for all that it fits."""

    order: FleetOrder
    replicas: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


class FleetOrders:
    """The orders that are still to be carried out."""

    def __init__(self, backend: LiveBackend, minimum: int, at_once: int, say: Say) -> None:
        self._backend = backend
        self._minimum = minimum
        self._at_once = at_once
        self._say = say
        self._tasks: deque[_Task] = deque()
        self._under_way: set[str] = set()
        self._errors: dict[str, str] = {}
        """Why the last change of a replica failed, where it did."""

    @property
    def pending(self) -> bool:
        """Whether anything is still to be done."""
        return bool(self._tasks or self._under_way)

    def take(self, command: FleetCommand) -> tuple[str, ...]:
        """Accept an order; return the replicas that it is for, in the order of their turns.

        Raises:
            OrderError: it cannot be carried out as things are; nothing is begun then.
        """
        if self.pending:
            raise OrderError(
                "An earlier order is still being carried out; `autopoiesis control fleet` shows how far it is."
            )
        names = command.replicas or self._all_for(command.order)
        if not names:
            raise OrderError(f"There is no replica to {command.order} now.")
        for name in names:
            self._check(command, name)
        self._check_minimum(command.order, names)
        for name in names:
            self._errors.pop(name, None)
        self._tasks.extend(_Task(command.order, name, command.limits) for name in names)
        return tuple(names)

    def go_on(self) -> None:
        """Begin what can begin now."""
        self._under_way &= set(self._backend.moving)
        while self._tasks and len(self._backend.moving) < self._at_once:
            task = self._tasks[0]
            taken = task.order in TAKES_AWAY and self._stands(task.name, Standing.READY)
            if taken and self._ready() <= self._minimum:
                return  # until another one is back
            self._begin(task)
            self._tasks.popleft()

    def heard(self, change: Reconfiguration) -> None:
        """Take in what came of a change; after a failure the rest is not touched."""
        self._under_way.discard(change.replica)
        self._errors[change.replica] = change.error
        if change.error and self._tasks:
            left = ", ".join(task.name for task in self._tasks)
            self._say(change.replica, f"the order ends here; {left} stay as they are")
            self._tasks.clear()

    def told(self) -> list[dict[str, Any]]:
        """Return every replica with what it does, is to do, and may do at once."""
        waiting = {task.name: str(task.order) for task in self._tasks}
        return [
            {
                "replica": slot.spec.name,
                "standing": self._does(slot),
                "kind": self._backend.members[slot.spec.name].kind,
                "address": self._backend.members[slot.spec.name].address,
                "max_num_seqs": slot.spec.profile.max_num_seqs,
                "max_num_batched_tokens": slot.spec.profile.max_num_batched_tokens,
                "ordered": waiting.get(slot.spec.name, ""),
                "error": self._errors.get(slot.spec.name, ""),
            }
            for slot in self._backend.slots()
        ]

    def _does(self, slot: Slot) -> str:
        asleep = self._backend.target(slot.spec.name).want is Want.ASLEEP
        return "asleep" if asleep and slot.standing is Standing.OFF else str(slot.standing)

    def _begin(self, task: _Task) -> None:
        backend, name = self._backend, task.name
        before = backend.target(name)
        target = replace(before, want=WANTED.get(task.order, Want.ON))
        if task.order is FleetOrder.RESTART:
            target = replace(
                target, limits=task.limits.over(before.limits), restart=before.restart + 1
            )
        serves = self._stands(name, Standing.READY)
        backend.tell(name, target, drain=task.order in TAKES_AWAY and serves)
        self._under_way.add(name)
        self._say(name, f"{task.order} begins{': it drains first' if serves else ''}")

    def _all_for(self, order: FleetOrder) -> tuple[str, ...]:
        here = [m for m in self._backend.members.values() if m.kind != "remote"]
        if order is FleetOrder.RESTART:
            standing = {Standing.READY, Standing.LOST}
            return tuple(m.name for m in here if self._backend.standing(m.name) in standing)
        if order in {FleetOrder.START, FleetOrder.WAKE}:
            away = [m for m in here if self._backend.standing(m.name) is Standing.OFF]
            return tuple(m.name for m in away)
        raise OrderError(f"Name the replicas to {order}.")

    def _check(self, command: FleetCommand, name: str) -> None:
        """Refuse what a replica cannot do."""
        order, backend = command.order, self._backend
        if name not in backend.members:
            known = ", ".join(backend.members)
            raise OrderError(f"There is no replica {name}; there are: {known}.")
        member, standing = backend.members[name], backend.standing(name)
        if member.kind == "remote" and order not in {FleetOrder.STOP, FleetOrder.START}:
            raise OrderError(
                f"{name} runs elsewhere and is started and changed there; stop and start only take its traffic "
                "away and give it back."
            )
        if order in {FleetOrder.SLEEP, FleetOrder.WAKE} and not member.sleeps:
            raise OrderError(
                f"{name} cannot sleep; start vLLM with --enable-sleep-mode, or stop the replica instead."
            )
        if member.kind == "simulated" and command.limits.tensor_parallel > 1:
            raise OrderError(f"{name} is simulated; its tensor_parallel is that of its profile.")
        off = standing is Standing.OFF
        if order in TAKES_AWAY and off:
            raise OrderError(f"{name} is off already; start it.")
        if order in {FleetOrder.START, FleetOrder.WAKE} and not off:
            raise OrderError(f"{name} is {standing}; there is nothing to {order}.")

    def _check_minimum(self, order: FleetOrder, names: Sequence[str]) -> None:
        if order not in TAKES_AWAY:
            return
        on = [n for n in self._backend.members if self._backend.target(n).want is Want.ON]
        away = 1 if order is FleetOrder.RESTART else len(set(names) & set(on))
        if len(on) - away < self._minimum:
            raise OrderError(
                f"{len(on)} replicas are on, and at least {self._minimum} must serve at any time "
                "(minimum_replicas); start another one first."
            )

    def _ready(self) -> int:
        return sum(self._stands(name, Standing.READY) for name in self._backend.members)

    def _stands(self, name: str, standing: Standing) -> bool:
        return self._backend.standing(name) is standing
