"""Plan control: after every window the leading arm's slow policy may change what the fleet is.

The policy runs in its sandbox. A plan is checked (capacity, minimum replicas, how much may change at once,
nothing while replicas still come up) and then carried out step by step through a `CapacityBackend`. What
it cost is measured: the time the policy took, the time that the fleet ran on the old plan, and the
replica-seconds in which a replica was there and served nobody. The last two are charged to the arm.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from autopoiesis.arms.migration import Action, Step, migration
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind, Plan, plan_to_plain
from autopoiesis.arms.plan_check import PlanLimits, check
from autopoiesis.arms.sandbox.slow_arm import SandboxError, SlowFault
from autopoiesis.arms.slow_features import FleetFeatures, WindowFeatures
from autopoiesis.orchestrator.capacity import (
    CapacityBackend,
    Slot,
    Standing,
    StepError,
    plan_from_kinds,
    plan_of,
)
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.plan_features import (
    Durations,
    History,
    describe,
    features_from_plain,
    features_to_plain,
    fleet_features,
)
from autopoiesis.orchestrator.plan_terms import Outcome, Planner, PlanSettings, Stepped
from autopoiesis.telemetry.records import EventRow, PlanRow, Reconfiguration, WindowRow

PATIENCE = 3.0
"""How many times as long as it usually takes a start and a drain may take."""


@dataclass(slots=True)
class _Running:
    """A plan that is being carried out."""

    arm_id: str
    plan: Plan
    window: int
    decided_s: float
    scheduling_s: float
    cpu_s: float
    steps: deque[Step] = field(default_factory=deque[Step])
    idle_s: float = 0.0
    """Replica-seconds so far in which a replica was there and served nobody."""
    seen_s: float = 0.0
    """Up to when these are counted."""
    moved: tuple[int, int] = (0, 0)
    """Steps that were left and replicas that were on the move when anything happened last."""
    moved_s: float = 0.0
    """When that was."""
    fault: str = ""
    """Why the rest of its steps is not taken, empty while they are."""


class PlanControl:
    """Asks one slow policy at a time, and carries out one plan at a time."""

    def __init__(
        self,
        settings: PlanSettings,
        backend: CapacityBackend,
        planner_of: Callable[[str], Planner | None],
    ) -> None:
        """`planner_of` returns the slow policy of an arm, None where it has none that ever acts."""
        self.settings = settings
        self.history = History()
        self.durations = Durations()
        self._backend = backend
        self._planner_of = planner_of
        self._planner: tuple[str, Planner | None] = ("", None)
        self._running: _Running | None = None
        self._last_word: tuple[str, Outcome, str] | None = None
        self._started_s: dict[str, float] = {}

    @property
    def pending(self) -> bool:
        """Whether a plan is being carried out."""
        return self._running is not None

    def step(
        self,
        window: int,
        arm_id: str,
        seen: Observation,
        objective: Objective,
        settled: WindowRow | None,
    ) -> Stepped:
        """Go on with the plan in progress, or ask the leading arm for one.

        `seen` is what is known of the window that has just ended, `settled` the one before it.
        """
        if self.settings.mode == "off":
            return Stepped()
        now_s = seen.ended_s
        features = describe(
            seen,
            objective,
            self.history,
            self._backend.slots(),
            drifted=bool(settled and settled.drift),
            regret=(settled.regret or 0.0) if settled else 0.0,
        )
        self.history.windows_since += 1
        if self._running is not None:
            return self._go_on(self._running, now_s, seen.ended_s - seen.started_s)
        return self._ask(window, now_s, arm_id, features)

    def close(self) -> None:
        """End the slow policy's process."""
        if self._planner[1] is not None:
            self._planner[1].close()
        self._planner = ("", None)

    # --- asking -------------------------------------------------------------------------------

    def _ask(self, window: int, now_s: float, arm_id: str, features: WindowFeatures) -> Stepped:
        planner = self._asked_of(arm_id)
        slots = self._backend.slots()
        settling = self.history.windows_since <= self.settings.pause_windows
        first = self.history.changed_s is None
        starting = any(slot.standing is Standing.STARTING for slot in slots)
        if planner is None or starting or (settling and not first):
            return Stepped()
        plan = plan_of(slots)
        fleet = fleet_features(
            slots, features, self.history, self.durations, self.settings.minimum_replicas
        )
        spent_s = cpu_s = 0.0
        proposed: Plan | None = None
        try:
            wanted = planner.should_reschedule(features, fleet, plan)
            spent_s, cpu_s = wanted.wall_s, wanted.cpu_s
            if not wanted.value:
                return Stepped()
            answer = planner.schedule(features, fleet, plan)
            spent_s, cpu_s = spent_s + answer.wall_s, cpu_s + answer.cpu_s
            proposed = answer.value
            outcome, why = self._judge(proposed, plan, fleet)
        except SlowFault as fault:
            spent_s, cpu_s = spent_s + fault.wall_s, cpu_s + fault.cpu_s
            outcome, why = Outcome.FAILED, str(fault)
        except SandboxError as error:
            self._planner = (arm_id, None)  # it cannot be run here; said once per arm
            outcome, why = Outcome.FAILED, str(error)
        chosen = proposed or plan
        word = (arm_id, outcome, _text(chosen))
        if word == self._last_word and outcome is not Outcome.BEGUN:
            return Stepped()  # said before
        self._last_word = word
        if outcome is Outcome.BEGUN and proposed is not None:
            steps = deque(self._steps(plan, proposed, fleet))
            self._running = _Running(
                arm_id, proposed, window, now_s, spent_s, cpu_s, steps, seen_s=now_s, moved_s=now_s
            )
            self._begin_steps(self._running, now_s)
        row = PlanRow(window, *word, now_s, spent_s, cpu_s)
        said = f"{outcome}: {why or _told(chosen)}"
        return Stepped((row,), (EventRow(now_s, "plan", window, arm_id, said),))

    def _asked_of(self, arm_id: str) -> Planner | None:
        """Return the arm's slow policy; another arm's is closed."""
        if self._planner[0] != arm_id:
            self.close()
            self._planner = (arm_id, self._planner_of(arm_id))
        return self._planner[1]

    def _judge(self, proposed: Plan, plan: Plan, fleet: FleetFeatures) -> tuple[Outcome, str]:
        if proposed.kinds() == plan.kinds():
            return Outcome.KEPT, ""
        limits = PlanLimits(max_changes=self.settings.max_changes)
        if faults := check(proposed, fleet, limits, plan):
            return Outcome.REFUSED, faults[0]
        if self.settings.mode == "dry-run":
            return Outcome.DRY_RUN, ""
        try:
            self._steps(plan, proposed, fleet)
        except (ValueError, StepError) as error:
            return Outcome.REFUSED, str(error)
        return Outcome.BEGUN, ""

    def _steps(self, plan: Plan, proposed: Plan, fleet: FleetFeatures) -> tuple[Step, ...]:
        """Return the steps to the plan; StepError where a replica in it has no place of its kind."""
        slots = self._backend.slots()
        there = [slot for slot in slots if slot.standing is not Standing.LOST]
        for kind, wanted in proposed.kinds().items():
            possible = sum(slot.fits(kind) for slot in there)
            if wanted > possible:
                raise StepError(
                    f"{wanted} replicas of {kind.model} on {kind.gpu} with max_num_seqs {kind.max_num_seqs} "
                    f"are asked for; {possible} can run here."
                )
        return migration(plan, proposed, {gpu.name: gpu.available for gpu in fleet.gpus})

    # --- carrying out -------------------------------------------------------------------------

    def _begin_steps(self, running: _Running, now_s: float) -> None:
        """Begin what can begin now. A start waits for a place; the steps behind it wait with it."""
        while running.steps and self._may_begin(running.steps[0]):
            step = running.steps[0]
            try:
                name = self._backend.carry_out(step)
            except StepError:
                return
            if step.action is Action.START:
                self._started_s[name] = now_s
            running.steps.popleft()

    def _may_begin(self, step: Step) -> bool:
        """Tell whether a step keeps enough replicas serving, and few enough on the move."""
        slots = self._backend.slots()
        moving = sum(s.standing in {Standing.STARTING, Standing.DRAINING} for s in slots)
        ready = [s for s in slots if s.standing is Standing.READY]
        of_model = sum(s.kind.model == step.kind.model for s in ready)
        is_lost = any(s.standing is Standing.LOST and s.kind == step.kind for s in slots)
        enough = step.action is Action.START or is_lost or of_model > self.settings.minimum_replicas
        return enough and moving < self.settings.at_once

    def learn(self, change: Reconfiguration) -> None:
        """Take in that a replica was changed, by a plan or by an operator; a plan whose change failed is given up."""
        self.durations = self.durations.learned(change)
        self._started_s.pop(change.replica, None)
        if self._running is not None and change.error:
            self._running.fault = f"{change.replica} could not {change.action}: {change.error}"

    def _go_on(self, running: _Running, now_s: float, window_s: float) -> Stepped:
        if running.fault:
            running.steps.clear()
        self._begin_steps(running, now_s)
        slots = self._backend.slots()
        lasted_s = now_s - running.seen_s
        moving = [s for s in slots if s.standing in {Standing.STARTING, Standing.DRAINING}]
        there = [s for s in slots if s.standing is not Standing.OFF]
        idle_s = lasted_s * len(moving)
        running.idle_s, running.seen_s = running.idle_s + idle_s, now_s
        charge = idle_s / max(lasted_s * len(there), 1e-9)
        self._learn_durations(slots, now_s)
        if running.moved != (moved := (len(running.steps), len(moving))):
            running.moved, running.moved_s = moved, now_s
        late = now_s - running.moved_s > self._patience_s(window_s)
        if not late and (running.steps or moving):
            return Stepped(arm_id=running.arm_id, charge=charge)
        done = not running.steps and not moving
        outcome = Outcome.APPLIED if done and not running.fault else Outcome.GIVEN_UP
        row = PlanRow(
            running.window,
            running.arm_id,
            outcome,
            _text(running.plan),
            running.decided_s,
            running.scheduling_s,
            running.cpu_s,
            stale_s=now_s - running.decided_s + running.scheduling_s,
            idle_replica_s=running.idle_s,
            finished_s=now_s,
        )
        said = (
            f"{outcome}: {_told(running.plan)}; {row.stale_s:.1f} s on the old plan, "
            f"{row.idle_replica_s:.1f} replica-seconds idle{f'; {running.fault}' if running.fault else ''}"
        )
        self._running = None
        self.history.windows_since, self.history.changed_s = 0, now_s
        event = EventRow(now_s, "plan", running.window, running.arm_id, said)
        return Stepped((row,), (event,), running.arm_id, charge)

    def _patience_s(self, window_s: float) -> float:
        """Return how long nothing may happen: some windows, and by far longer than a start has taken."""
        usual_s = self.durations.start_s + self.durations.drain_s
        return max(self.settings.patience_windows * window_s, PATIENCE * usual_s)

    def _learn_durations(self, slots: Sequence[Slot], now_s: float) -> None:
        """Take what starts really took for what the next ones will take."""
        for slot in slots:
            began_s = self._started_s.get(slot.spec.name)
            if began_s is not None and slot.standing is Standing.READY:
                del self._started_s[slot.spec.name]
                self.durations = replace(
                    self.durations, load_s=now_s - began_s, engine_s=0.0, warmup_s=0.0
                )

    # --- memory -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        running = self._running
        return {
            "before": features_to_plain(self.history.before),
            "available": self.history.available,
            "since": [self.history.windows_since, self.history.changed_s],
            "durations": asdict(self.durations),
            "started_s": self._started_s,
            "running": None
            if running is None
            else {
                "arm_id": running.arm_id,
                "kinds": [[*kind, n] for kind, n in running.plan.kinds().items()],
                "steps": [[step.action, *step.kind] for step in running.steps],
                "numbers": [running.window, running.decided_s, running.scheduling_s, running.cpu_s],
                "idle": [running.idle_s, running.seen_s],
                "moved": [*running.moved, running.moved_s],
                "fault": running.fault,
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self.history.before = features_from_plain(state.get("before"))
        self.history.available = dict(state["available"])
        self.history.windows_since, self.history.changed_s = state["since"]
        if "load_s" in state["durations"]:
            self.durations = Durations(**state["durations"])
        self._started_s = dict(state["started_s"])
        kept = state["running"]
        if kept is not None:
            kinds = Counter({Kind(*kind): n for *kind, n in kept["kinds"]})
            steps = deque(Step(Action(action), Kind(*kind)) for action, *kind in kept["steps"])
            window, decided_s, scheduling_s, cpu_s = kept["numbers"]
            idle_s, seen_s = kept["idle"]
            *moved, moved_s = kept.get("moved", (0, 0, decided_s))
            self._running = _Running(
                kept["arm_id"], plan_from_kinds(kinds), window, decided_s, scheduling_s, cpu_s,
                steps, idle_s, seen_s, (moved[0], moved[1]), moved_s, kept.get("fault", ""),
            )  # fmt: skip


def _text(plan: Plan) -> str:
    return orjson.dumps(plan_to_plain(plan)).decode()


def _told(plan: Plan) -> str:
    return ", ".join(
        f"{n} of {kind.model} on {kind.gpu}" for kind, n in sorted(plan.kinds().items())
    )
