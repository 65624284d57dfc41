"""Changes of the fleet beside a running window loop: plans of slow policies, and orders of an operator.

A slow policy is asked in a thread and answered in a later window, since it may take seconds: meanwhile windows
close and requests are served; the plan runs on what was true when it was asked, and that time is part of what
it costs. While an order is being carried out no plan is made.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.registry import Registry
from autopoiesis.gateway.settings import RunDir
from autopoiesis.orchestrator.fleet_orders import FleetCommand, FleetOrders
from autopoiesis.orchestrator.live_capacity import LiveBackend, SpecOf
from autopoiesis.orchestrator.loop import Settled, WindowLoop
from autopoiesis.orchestrator.plan_control import PlanControl
from autopoiesis.orchestrator.plan_features import Durations
from autopoiesis.orchestrator.plan_terms import PlanSettings
from autopoiesis.orchestrator.planners import planners
from autopoiesis.orchestrator.rails import OrderError
from autopoiesis.orchestrator.reconfigurations import measured_durations
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.targets import ChangeLog, TargetFile, target_from
from autopoiesis.telemetry.records import EventRow, PlanRow, Reconfiguration, ReplicaSample
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.simulation import ReplicaSpec

log = logging.getLogger(__name__)

STATE = "plans"
"""Name of the array that plan control keeps among the loop's."""


class LivePlans:
    """What the controller needs of changes of the fleet; with mode "off" only an operator makes any."""

    def __init__(
        self,
        settings: PlanSettings,
        stand_in: str,
        members: Sequence[Member],
        spec: SpecOf,
        files: tuple[TargetFile, ChangeLog],
        registry: Registry,
        state: Mapping[str, NDArray[Any]],
        durations: Durations,
        say: Callable[[str, str], None],
        changed: Callable[[], None],
    ) -> None:
        """Go on from what was stored with the last window, as far as it fits.

        `say` is told of a replica's changes, `changed` when who may have traffic is not as it was.
        """
        self._on = settings.mode != "off"
        targets, self._log = files
        self._backend = LiveBackend(members, spec, targets)
        self.orders = FleetOrders(self._backend, settings.minimum_replicas, settings.at_once, say)
        self._control = PlanControl(settings, self._backend, planners(registry, stand_in))
        self._control.durations = durations
        self._say, self._changed = say, changed
        self._asking: asyncio.Task[None] | None = None
        self._rows: list[PlanRow] = []
        self._events: list[EventRow] = []
        self._changes: list[Reconfiguration] = []
        self._charges: list[tuple[str, float]] = []
        self._known: dict[str, Any] = {}
        if STATE in state:
            try:
                self._restore(orjson.loads(np.asarray(state[STATE], np.uint8).tobytes()))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("What plan control knew cannot be used: %s", error)
        self._serving = self._able()

    def _restore(self, kept: dict[str, Any]) -> None:
        self._log.skip(*kept["heard"])
        self._backend.go_on_draining({n: target_from(t) for n, t in kept["draining"].items()})
        if self._on and kept["control"]:
            self._control.restore(kept["control"])
            self._known = kept["control"]

    def follow(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        self._backend.follow(members)
        self._notice()

    def saw(self, samples: Sequence[ReplicaSample], allocation: Allocation | None) -> None:
        """Take in what replicas report, which of them the allocation still feeds, and what was done to them."""
        cells = allocation.cells if allocation else ()
        try:
            self._backend.saw(samples, Counter(r for cell in cells for r in cell.replicas))
            for change in self._log.new():
                self._hear(change)
            self.orders.go_on()
        except OSError as error:  # a full disk, say: the next report brings another try
            log.error("Replicas cannot be told what to do: %s", error)
        self._notice()

    def _hear(self, change: Reconfiguration) -> None:
        change = self._backend.heard(change)
        self._changes.append(change)
        self._control.learn(change)
        self.orders.heard(change)
        drained = f" after {change.drain_s:.1f} s of draining" if change.drain_s else ""
        came = f"failed and was taken back: {change.error}" if change.error else "done"
        told = f"{change.action} {came}; it took {change.seconds:.1f} s{drained}"
        self._say(change.replica, told)

    def _able(self) -> frozenset[str]:
        return frozenset(n for n in self._backend.members if self._backend.takes_traffic(n))

    def _notice(self) -> None:
        """Tell at once where who may have traffic has changed, whoever began that."""
        able = self._able()
        if able != self._serving:
            self._serving = able
            self._changed()

    def able(self, fleet: Sequence[ReplicaSpec]) -> tuple[ReplicaSpec, ...]:
        """Return those of these replicas that are to have traffic."""
        return tuple(spec for spec in fleet if self._backend.takes_traffic(spec.name))

    def expected_away(self, name: str) -> bool:
        """Tell whether it is a plan's or an operator's doing that a replica does not answer."""
        return self._backend.expected_away(name)

    def order(self, command: FleetCommand) -> tuple[str, ...]:
        """Take an operator's order; return the replicas it is for. Raises OrderError."""
        if self._control.pending:
            raise OrderError("A plan is being carried out; wait, or set plan_control to off.")
        names = self.orders.take(command)
        self.orders.go_on()
        self._notice()
        return names

    def consider(
        self, loop: WindowLoop, window: int, leading: str, settled: Settled | None
    ) -> None:
        """Go on with the plan, or ask the leading arm for one, beside whatever else happens."""
        for arm_id, charge in self._charges:
            loop.charge(arm_id, charge)
        self._charges.clear()
        busy = self.orders.pending or (self._asking is not None and not self._asking.done())
        if self._on and not busy and loop.latest is not None:
            arguments = (window, leading, loop.latest, loop.objective)
            row = settled.window if settled else None

            async def ask() -> None:
                stepped = await asyncio.to_thread(self._control.step, *arguments, row)
                self._known = self._control.to_dict()
                self._rows += stepped.rows
                self._events += stepped.events
                if stepped.arm_id:
                    self._charges.append((stepped.arm_id, stepped.charge))

            self._asking = asyncio.create_task(ask(), name="ask for a plan")
            self._asking.add_done_callback(_tell_failure)

    def collect(self) -> tuple[list[PlanRow], list[EventRow], list[Reconfiguration]]:
        """Return the rows and events since the last time."""
        rows, self._rows = self._rows, []
        events, self._events = self._events, []
        changes, self._changes = self._changes, []
        return rows, events, changes

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what is known, for the loop's arrays."""
        draining = {name: asdict(target) for name, target in self._backend.draining().items()}
        kept = {"control": self._known, "draining": draining, "heard": self._log.heard}
        return {STATE: np.frombuffer(orjson.dumps(kept), np.uint8).copy()}

    async def close(self) -> None:
        """End the slow policy's process."""
        self._control.close()
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)


def live_plans(
    settings: Settings,
    members: Sequence[Member],
    spec: SpecOf,
    registry: Registry,
    store: Store,
    state: Mapping[str, NDArray[Any]],
    say: Callable[[str, str], None],
    changed: Callable[[], None],
) -> LivePlans:
    """Return changes of the fleet of an instance with these settings, which go on from its stored state."""
    run_dir = RunDir(settings.run_dir)
    return LivePlans(
        settings.plans,
        settings.slow_policy,
        members,
        spec,
        (TargetFile(run_dir.targets), ChangeLog(run_dir.changes)),
        registry,
        state,
        measured_durations(store),
        say,
        changed,
    )


def _tell_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("Plan control failed: %s", error)
