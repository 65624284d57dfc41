"""Plan control beside a running window loop: asked in a thread, answered in a later window.

A slow policy may take seconds. Meanwhile windows close and requests are served; the plan runs on what was
true when it was asked, and that time is part of what it costs.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.capacity import Standing
from autopoiesis.orchestrator.live_capacity import LiveBackend, SwitchFile
from autopoiesis.orchestrator.loop import Settled, WindowLoop
from autopoiesis.orchestrator.plan_control import PlanControl, PlanSettings
from autopoiesis.orchestrator.planners import planners
from autopoiesis.telemetry.records import EventRow, PlanRow, ReplicaSample
from autopoiesis.twin.simulation import ReplicaSpec

log = logging.getLogger(__name__)

STATE = "plans"
"""Name of the array that plan control keeps among the loop's."""


class LivePlans:
    """What the controller needs of plan control; with mode "off" it does nothing and takes nobody away."""

    def __init__(
        self,
        settings: PlanSettings,
        stand_in: str,
        fleet: Sequence[ReplicaSpec],
        switches: SwitchFile,
        registry: Registry,
        state: Mapping[str, NDArray[Any]],
    ) -> None:
        """Go on from what was stored with the last window, as far as it fits."""
        self._on = settings.mode != "off"
        self._backend = LiveBackend(fleet, switches)
        self._control = PlanControl(settings, self._backend, planners(registry, stand_in))
        self._asking: asyncio.Task[None] | None = None
        self._rows: list[PlanRow] = []
        self._events: list[EventRow] = []
        self._charges: list[tuple[str, float]] = []
        self._known: dict[str, Any] = {}
        if self._on and STATE in state:
            try:
                kept = orjson.loads(np.asarray(state[STATE], np.uint8).tobytes())
                self._control.restore(kept["control"])
                self._backend.go_on_draining(kept["draining"])
                self._known = kept["control"]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("What plan control knew cannot be used: %s", error)

    def saw(self, samples: Sequence[ReplicaSample], allocation: Allocation | None) -> None:
        """Take in what replicas report, and which of them the allocation still feeds."""
        if self._on:
            cells = allocation.cells if allocation else ()
            self._backend.saw(samples, Counter(r for cell in cells for r in cell.replicas))

    def able(self, fleet: Sequence[ReplicaSpec]) -> tuple[ReplicaSpec, ...]:
        """Return those of these replicas that are to have traffic."""
        if not self._on:
            return tuple(fleet)
        away = {Standing.OFF, Standing.STARTING, Standing.DRAINING}
        return tuple(spec for spec in fleet if self._backend.standing(spec.name) not in away)

    def expected_away(self, name: str) -> bool:
        """Tell whether it is the plan's doing that a replica does not answer."""
        return self._on and self._backend.expected_away(name)

    def consider(
        self, loop: WindowLoop, window: int, leading: str, settled: Settled | None
    ) -> None:
        """Go on with the plan, or ask the leading arm for one, beside whatever else happens."""
        for arm_id, charge in self._charges:
            loop.charge(arm_id, charge)
        self._charges.clear()
        busy = self._asking is not None and not self._asking.done()
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

    def collect(self) -> tuple[list[PlanRow], list[EventRow]]:
        """Return the rows and events since the last time."""
        rows, self._rows = self._rows, []
        events, self._events = self._events, []
        return rows, events

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what plan control knows, for the loop's arrays."""
        if not self._known:
            return {}
        kept = {"control": self._known, "draining": self._backend.draining()}
        return {STATE: np.frombuffer(orjson.dumps(kept), np.uint8).copy()}

    async def close(self) -> None:
        """End the slow policy's process."""
        self._control.close()
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)


def _tell_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("Plan control failed: %s", error)
