"""The words of plan control: how far plans may go, who makes them, and what comes of them."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from autopoiesis.arms.plan import Plan
from autopoiesis.arms.sandbox.slow_arm import Answer
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures
from autopoiesis.telemetry.records import EventRow, PlanRow

Mode = Literal["off", "dry-run", "on"]


class Outcome(StrEnum):
    """What became of a slow policy's word."""

    BEGUN = "begun"
    """Its plan is in order and is being carried out."""
    APPLIED = "applied"
    """Its plan has been carried out; the row tells what that cost."""
    GIVEN_UP = "given up"
    """It could not be carried out to the end: the fleet stays as far as it came."""
    DRY_RUN = "dry run"
    """Its plan is in order and was not carried out."""
    KEPT = "kept the old one"
    """It wanted a plan, and that is the present one."""
    REFUSED = "refused"
    """Its plan cannot be carried out."""
    FAILED = "failed"
    """It crashed, took too long, or answered no plan."""


class Stepped(NamedTuple):
    """What plan control did after a window."""

    rows: tuple[PlanRow, ...] = ()
    events: tuple[EventRow, ...] = ()
    arm_id: str = ""
    """Whose plan is paid for, empty for nobody's."""
    charge: float = 0.0
    """Share of the fleet's replica-seconds since the last step in which its plan kept replicas idle."""


class Planner(Protocol):
    """A slow policy at work."""

    def should_reschedule(
        self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan
    ) -> Answer[bool]:
        """Tell whether to make a new plan."""
        ...

    def schedule(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer[Plan]:
        """Return the next plan."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How far plans may go."""

    mode: Mode = "off"
    minimum_replicas: int = 1
    max_changes: int = 4
    """Most replicas that may start or stop for one plan."""
    pause_windows: int = 3
    """Windows after a plan was carried out in which no policy is asked."""
    patience_windows: int = 60
    """Windows without anything happening after which a plan is given up, if starts are not known to take longer."""
    at_once: int = 1 << 16
    """Replicas that may start or drain at the same time."""
