"""A trace served by a fleet whose plan a slow policy makes: what that took, and what became of the requests.

The policy is asked after every window. Its CPU time is simulated time: until a plan is there, the old one serves
on (it is stale). Then replicas drain, stop and start one after the other (`arms.migration`), and serve nothing
meanwhile. GPUs that go away take what runs on them along. Shares of groups are left to the fast functions.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.machine import Program
from autopoiesis.arms.migration import Action as Move
from autopoiesis.arms.migration import Step, migration
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup
from autopoiesis.arms.plan_check import PlanLimits, check
from autopoiesis.arms.sandbox.slow_arm import Answer, SlowFault
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures
from autopoiesis.twin.capacity import Action, CapacityChange, ReplicaState
from autopoiesis.twin.cells import SimCell
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.simulation import Simulation
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.window_features import Beside, window_features
from autopoiesis.twin.yard import Yard, capacity_rps

TICK_S = 0.5
"""How often the plan's carrying out is looked after."""
USUAL_LENGTHS = 1000.0, 200.0
"""Prompt and output tokens by which capacity is predicted before anything is known."""


class Planner(Protocol):
    """A slow policy that can be asked; each answer tells what it cost. A SlowFault keeps the plan."""

    def should_reschedule(
        self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan
    ) -> Answer[bool]:
        """Ask whether to make a new plan."""
        ...

    def schedule(self, window: WindowFeatures, fleet: FleetFeatures, plan: Plan) -> Answer[Plan]:
        """Ask for the next plan."""
        ...


@dataclass(frozen=True, slots=True)
class Replanned:
    """One answer of the planner."""

    at_s: float
    """End of the window after which it was asked."""
    thought_s: float
    """CPU time that it took [s], for which the old plan served on."""
    plan: Plan | None
    """None: it failed."""
    kept: str = ""
    """Why the old plan was kept; empty if it was not."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What became of a trace under a slow policy."""

    outcome: Outcome
    plans: tuple[Replanned, ...]
    windows: tuple[WindowFeatures, ...]
    gpu_seconds: float
    """GPUs in use, by replicas in whatever state, until the last arrival."""
    scheduling_s: float
    """CPU time of the policy, the questions that it answered with no included."""
    changing_s: float
    """Time during which replicas were stopping or starting."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A place in the simulated fleet where a replica of one way may run."""

    gpu: str
    width: int
    kind: Kind | None = None
    """What runs, starts or stops there."""
    free_at_s: float | None = None
    """When its GPUs are free, once it is empty."""
    stopping: bool = False


def serve_planned(
    trace: Trace, program: Program, planner: Planner, yard: Yard, objective: Objective, seed: int
) -> Planned:
    """Serve the trace with fast functions that route on what the planner has made of the yard."""
    return _Service(trace, program, planner, yard, objective, seed).run()


class _Service:
    """The state of one run."""

    def __init__(
        self,
        trace: Trace,
        program: Program,
        planner: Planner,
        yard: Yard,
        objective: Objective,
        seed: int,
    ) -> None:
        self._yard = yard
        self._planner = planner
        self._objective = objective
        self._end_s = trace.duration_s
        self._rng = np.random.default_rng([seed, 7])
        self._slots = [
            _Slot(way.gpu, way.tensor_parallel)
            for way in yard.ways
            for _ in range(max(yard.gpu(way.gpu).available) // way.tensor_parallel)
        ]
        self._plan = yard.first
        for kind in yard.first.kinds().elements():
            self._free_slot(kind).kind = kind
        idle = {(w.gpu, w.tensor_parallel): Kind(yard.model, w.gpu, w.tensor_parallel, 1 << 16, 1 << 24, "serve")
                for w in yard.ways}  # fmt: skip
        specs = [
            yard.spec(slot.kind or idle[slot.gpu, slot.width], f"{slot.gpu}-{i}")
            for i, slot in enumerate(self._slots)
        ]
        present = [slot.kind is not None for slot in self._slots]
        self._simulation = Simulation(trace, specs, objective, seed, present=present)
        everywhere = tuple(range(len(specs))), tuple(range(SHARDS))
        self._simulation.allocate([SimCell(program, *everywhere)])
        self._counts = {gpu.name: gpu.at(0.0) for gpu in yard.gpus}
        self._steps: deque[Step] = deque()
        self._awaited: tuple[float, Plan] | None = None
        """When the plan that is being made is there, and the plan."""
        self._changed_s = 0.0
        self._windows_since = 0
        self._reports: list[np.ndarray] = []
        self._preempted = 0
        self._windows: list[WindowFeatures] = []
        self._plans: list[Replanned] = []
        self._gpu_seconds = self._scheduling_s = self._changing_s = 0.0

    def run(self) -> Planned:
        """Serve from the first arrival to the last end."""
        per_window = max(round(self._yard.window_s / TICK_S), 1)
        for tick in range(1, math.floor(self._end_s / TICK_S) + 1):
            now_s = tick * TICK_S
            self._simulation.advance(now_s)
            self._follow_capacity(now_s)
            self._follow_stops(now_s)
            if self._awaited and self._awaited[0] <= now_s:
                self._adopt(self._awaited[1], now_s)
            self._carry_out()
            self._account()
            if tick % per_window == 0:
                self._close_window(now_s)
        self._simulation.advance(math.inf)
        return Planned(
            self._simulation.outcome(),
            tuple(self._plans),
            tuple(self._windows),
            self._gpu_seconds,
            self._scheduling_s,
            self._changing_s,
        )

    # --- what runs --------------------------------------------------------------------------------

    def _free_slot(self, kind: Kind) -> _Slot:
        wanted = kind.gpu, kind.tensor_parallel, None
        return next(s for s in self._slots if (s.gpu, s.width, s.kind) == wanted)

    def _free_gpus(self, gpu: str) -> int:
        used = sum(s.width for s in self._slots if s.kind and s.gpu == gpu)
        return self._counts[gpu] - used

    def _running(self) -> Counter[Kind]:
        """Return what serves or will, but not what is on its way out."""
        return Counter(s.kind for s in self._slots if s.kind and not s.stopping)

    def _change(self, slot: _Slot, action: Action, duration_s: float = 0.0) -> None:
        index = self._slots.index(slot)
        starts = action is Action.START and slot.kind is not None
        spec = self._yard.spec(slot.kind, f"{slot.gpu}-{index}") if starts and slot.kind else None
        change = CapacityChange(self._simulation.now_s, index, action, duration_s, spec)
        self._simulation.change(change)

    # --- GPUs that come and go ----------------------------------------------------------------------

    def _follow_capacity(self, now_s: float) -> None:
        for gpu in self._yard.gpus:
            gone = self._counts[gpu.name] - gpu.at(now_s)
            for _ in range(max(gone, 0)):
                self._take_away(gpu.name)
            self._counts[gpu.name] = gpu.at(now_s)

    def _take_away(self, gpu: str) -> None:
        """Take one GPU, any of those that there are, and with it what runs on it."""
        hit = int(self._rng.integers(max(self._counts[gpu], 1)))
        self._counts[gpu] -= 1
        for slot in self._slots:
            if slot.kind and slot.gpu == gpu:
                if hit < slot.width:
                    self._change(slot, Action.LOSE)
                    slot.kind, slot.free_at_s, slot.stopping = None, None, False
                    self._steps.clear()  # made for another fleet
                    return
                hit -= slot.width

    # --- plans ------------------------------------------------------------------------------------

    def _adopt(self, plan: Plan, now_s: float) -> None:
        """Begin to carry out a plan; what does not fit any more is left."""
        self._awaited = None
        try:
            self._steps = deque(migration(_as_plan(self._running()), plan, self._counts))
        except ValueError:
            return
        self._plan = plan
        self._changed_s, self._windows_since = now_s, 0

    def _carry_out(self) -> None:
        """Do the next steps, as far as GPUs are free for them."""
        while self._steps:
            action, kind = self._steps[0]
            if action is Move.STOP:
                slot = next(s for s in self._slots if s.kind == kind and not s.stopping)
                slot.stopping = True
                self._change(slot, Action.DRAIN)
            elif self._free_gpus(kind.gpu) >= kind.tensor_parallel:
                slot = self._free_slot(kind)
                slot.kind = kind
                yard = self._yard
                self._change(slot, Action.START, yard.load_s + yard.engine_s + yard.warmup_s)
            else:
                return
            self._steps.popleft()

    def _follow_stops(self, now_s: float) -> None:
        """Free the GPUs of replicas that are empty and have been stopped."""
        states = self._simulation.states()
        for slot, state in zip(self._slots, states, strict=True):
            if slot.stopping and state is ReplicaState.OFF:
                if slot.free_at_s is None:
                    slot.free_at_s = now_s + self._yard.stop_s
                if slot.free_at_s <= now_s:
                    slot.kind, slot.free_at_s, slot.stopping = None, None, False

    def _account(self) -> None:
        states = self._simulation.states()
        ready = [state is ReplicaState.READY for state in states]
        self._reports.append(self._simulation.reports()[ready])
        self._gpu_seconds += TICK_S * sum(s.width for s in self._slots if s.kind)
        changing = self._steps or any(s.stopping for s in self._slots)
        if changing or ReplicaState.STARTING in states:
            self._changing_s += TICK_S

    def _close_window(self, now_s: float) -> None:
        """Ask the planner, unless it is at work already or its last plan is not carried out yet."""
        self._windows_since += 1
        lengths = self._lengths()
        capacity = sum(
            group.replicas
            * capacity_rps(
                self._yard.way(group.gpu, group.tensor_parallel).profile, *lengths, self._objective
            )
            for group in self._plan.groups
        )
        preempted = self._simulation.preemptions
        beside = Beside(
            self._reports,
            capacity,
            preempted - self._preempted,
            windows_since_rescheduling=self._windows_since,
            seconds_since_rescheduling=now_s - self._changed_s,
        )
        self._reports, self._preempted = [], preempted
        window = window_features(
            self._simulation.outcome(),
            (now_s - self._yard.window_s, now_s),
            self._objective,
            (self._yard.model,),
            beside,
            self._windows[-1] if self._windows else None,
        )
        self._windows.append(window)
        if not self._steps and self._awaited is None:
            self._ask(window, now_s)

    def _ask(self, window: WindowFeatures, now_s: float) -> None:
        starting = self._simulation.states().count(ReplicaState.STARTING)
        lost = (self._plan.kinds() - self._running()).total()
        fleet = self._yard.features(
            now_s, self._lengths(), self._objective, starting=starting, lost=lost
        )
        thought_s = 0.0
        plan: Plan | None = None
        try:
            wanted = self._planner.should_reschedule(window, fleet, self._plan)
            thought_s = wanted.cpu_s
            if not wanted.value:
                self._scheduling_s += thought_s
                return
            answer = self._planner.schedule(window, fleet, self._plan)
            thought_s += answer.cpu_s
            limits = PlanLimits(max_changes=self._yard.max_changes)
            plan = answer.value
            kept = "; ".join(check(plan, fleet, limits, self._plan))
        except SlowFault as fault:
            thought_s += fault.cpu_s
            kept = str(fault)
        self._scheduling_s += thought_s
        self._plans.append(Replanned(now_s, thought_s, plan, kept))
        if plan is not None and not kept:
            self._awaited = now_s + thought_s, plan

    def _lengths(self) -> tuple[float, float]:
        """Return the mean prompt and output that were seen last [tokens]."""
        for window in reversed(self._windows):
            if window.input_tokens_mean > 0.0 and window.output_tokens_mean > 0.0:
                return window.input_tokens_mean, window.output_tokens_mean
        return USUAL_LENGTHS


def _as_plan(kinds: Counter[Kind]) -> Plan:
    return Plan(tuple(ReplicaGroup(*kind[:3], count, *kind[3:]) for kind, count in kinds.items()))
