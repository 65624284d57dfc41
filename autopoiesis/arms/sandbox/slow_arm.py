"""A slow policy at work: asked after every window, measured, and refused if it fails too often."""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

from autopoiesis.arms.plan import Plan, PlanError, plan_from_plain, plan_to_plain
from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.arms.sandbox.process import Bounds, SandboxError, SandboxProcess, SlowFault
from autopoiesis.arms.slow import SlowPolicy
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures, to_plain

__all__ = ["Answer", "Bounds", "SandboxError", "SlowArm", "SlowFault", "SlowRefused"]

MOST_FAULTS = 3
AMONG_CALLS = 100
"""After `MOST_FAULTS` faults among so many calls a policy is refused."""

T = TypeVar("T")


class SlowRefused(SlowFault):
    """The policy failed too often and is not asked any more."""


class Answer(NamedTuple, Generic[T]):
    """What a slow function answered, and what that cost."""

    value: T
    wall_s: float
    """Time from question to answer [s]: what the fleet waited."""
    cpu_s: float
    """CPU time of the policy's process since its last answer [s], by the kernel's clock; other load does
    not change it."""


class SlowArm:
    """A slow policy in a process of its own, which is started when asked and replaced after a fault.

    What goes wrong with the policy is a SlowFault; keep the current plan then. Where the machine cannot
    shut the process off, nothing is run (SandboxError) unless `allow_unsandboxed` says so. Not for use by
    several threads at once; it waits, so keep it off an event loop.
    """

    def __init__(
        self, policy: SlowPolicy, bounds: Bounds | None = None, *, allow_unsandboxed: bool = False
    ) -> None:
        self.policy = policy
        self._bounds = bounds or Bounds()
        self._least = Isolation.NONE if allow_unsandboxed else Isolation.FULL
        self._process: SandboxProcess | None = None
        self._sent: tuple[FleetFeatures | None, Plan | None] = (None, None)
        self._fared = deque[bool]([], AMONG_CALLS)

    def should_reschedule(
        self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan
    ) -> Answer[bool]:
        """Ask whether to make a new plan. Raises SlowFault, SandboxError."""
        return self._ask("should_reschedule", window, fleet, plan, self._bounds.trigger_s, _truth)

    def schedule(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer[Plan]:
        """Ask for the next plan, which is a plan but may not fit the fleet. Raises SlowFault, SandboxError."""
        return self._ask("schedule", window, fleet, plan, self._bounds.planner_s, _plan)

    def start(self) -> Isolation:
        """Start the process now rather than when it is asked. Raises SlowFault, SandboxError."""
        return self._running().isolation

    @property
    def isolation(self) -> Isolation | None:
        """How well the process is shut off; None if none runs."""
        return self._process.isolation if self._process else None

    @property
    def faults(self) -> int:
        """Faults among the last calls."""
        return self._fared.count(False)

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> SandboxProcess:
        if self.faults >= MOST_FAULTS:
            self.close()
            raise SlowRefused(
                f"It failed {self.faults} times in its last {len(self._fared)} calls and is not asked any more."
            )
        if self._process is None or self._process.ended:
            self._sent = (None, None)
            try:
                self._process = SandboxProcess(
                    self.policy.source, self.policy.modules, self._bounds, self._least
                )
            except SlowFault:
                self._fared.append(False)
                raise
            self._process.cpu_s()  # starting is not charged, all that follows is
        return self._process

    def _ask(
        self,
        function: str,
        window: WindowFeatures,
        fleet: FleetFeatures,
        plan: Plan,
        deadline_s: float,
        read: Callable[[object], T],
    ) -> Answer[T]:
        process = self._running()
        told_fleet, told_plan = self._sent
        arguments = (
            to_plain(window),
            None if fleet == told_fleet else to_plain(fleet),
            None if plan == told_plan else plan_to_plain(plan),
        )
        self._sent = (fleet, plan)
        started_s = time.monotonic()
        try:
            value = read(process.ask(function, arguments, deadline_s))
        except SlowFault as fault:
            fault.wall_s, fault.cpu_s = time.monotonic() - started_s, process.cpu_s()
            self._fared.append(False)
            raise
        except BaseException:  # its answer may still come, and would be taken for another's
            self.close()
            raise
        self._fared.append(True)
        return Answer(value, time.monotonic() - started_s, process.cpu_s())


def _truth(answer: object) -> bool:
    if not isinstance(answer, bool):
        raise SlowFault("Its answer is not True or False.")
    return answer


def _plan(answer: object) -> Plan:
    try:
        return plan_from_plain(answer)
    except PlanError as error:
        raise SlowFault(f"Its answer is no plan: {error}.") from None
