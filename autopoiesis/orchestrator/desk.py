"""Where the control API meets the controller: what may be asked, and what may be ordered."""

import asyncio
from collections.abc import Callable
from typing import Any

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.arm import Arm
from autopoiesis.arms.registry import Registry
from autopoiesis.gateway.link import PickerLink
from autopoiesis.orchestrator.fleet_orders import FleetCommand
from autopoiesis.orchestrator.governor import Command, Governor
from autopoiesis.orchestrator.live_plans import LivePlans
from autopoiesis.orchestrator.rails import AT_ONCE
from autopoiesis.orchestrator.registrar import NewArm, Registrar, Said, Step
from autopoiesis.orchestrator.status import Status
from autopoiesis.replicas.limits import Limits
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.records import SynthesisRow


class Desk:
    """Takes orders one after the other, and never while the loop decides."""

    def __init__(
        self,
        registry: Registry,
        registrar: Registrar,
        governor: Governor,
        status: Status,
        deciding: asyncio.Lock,
        link: PickerLink,
        reconsider: Callable[[], None],
        spare: Callable[[], Spare],
        keep: Callable[[SynthesisRow, str], int],
        fleet: LivePlans,
        tell: Callable[[str, str], None],
    ) -> None:
        """`reconsider` ends the running window: who serves must be decided anew; `keep` writes a cycle.

        `tell` writes down what an operator has ordered of whom.
        """
        self._registry = registry
        self._registrar = registrar
        self._governor = governor
        self._status = status
        self._deciding = deciding
        self._link = link
        self._reconsider = reconsider
        self._spare = spare
        self._keep = keep
        self._fleet = fleet
        self._tell = tell

    def status(self) -> dict[str, Any]:
        """Return a picture of now."""
        return self._status.as_dict()

    def waiting_for(self) -> list[str]:
        """Return what is missing before requests are decided as they should be."""
        missing = [] if self._status.allocation else ["the first allocation"]
        return missing if self._link.is_connected else [*missing, "the picker"]

    def allocation(self) -> dict[str, Any] | None:
        """Return who serves what now, None before the first allocation."""
        allocation = self._status.allocation
        if allocation is None:
            return None
        cells = [
            {
                "arm_id": cell.arm_id,
                "name": self._registry.get(cell.arm_id).name,
                "replicas": cell.replicas,
                "shards": cell.shards,
                "share": len(cell.shards) / SHARDS,
                "propensity": cell.propensity,
            }
            for cell in allocation.cells
        ]
        return {"window": allocation.window, "why": self._status.why, "cells": cells}

    def spare(self) -> Spare:
        """Return whether the fleet has time to spare."""
        return self._spare()

    def fleet(self) -> list[dict[str, Any]]:
        """Return every replica with what it does and may do at once."""
        return self._fleet.orders.told()

    def order_of_fleet(self, command: FleetCommand, said: Said) -> tuple[str, ...]:
        """Take an order for replicas; return whom it is for, in the order of their turns."""
        names = self._fleet.order(command)
        limits = f" with {command.limits}" if command.limits != Limits() else ""
        self._tell(", ".join(names), f"{command.order}{limits} {said.of('ordered')}")
        return names

    async def add_arm(self, new: NewArm, said: Said) -> tuple[Arm, bool]:
        """Take a policy in; return the arm, and whether it is new."""
        async with self._deciding:
            return self._registrar.add(new, said)

    async def change_arm(self, which: str, step: Step, said: Said) -> Arm:
        """Do one step to an arm; one that serves no more is replaced at once."""
        async with self._deciding:
            arm = self._registrar.step(which, step, said)
        allocation = self._status.allocation
        if not arm.serves and allocation and arm.id in allocation.arms():
            self._reconsider()
        return arm

    async def keep_cycle(self, cycle: SynthesisRow, said: Said) -> int:
        """Write the account of a synthesis cycle by hand; return its number."""
        return await asyncio.to_thread(self._keep, cycle, said.of("run"))

    async def obey(self, command: Command, said: Said) -> None:
        """Carry out an order."""
        async with self._deciding:
            allocation = self._status.allocation
            window = allocation.window if allocation else -1
            self._governor.obey(command, said, window, allocation)
        if command.order in AT_ONCE:
            self._reconsider()
