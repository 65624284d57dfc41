"""The window loop: what came of a window, what is believed now, who serves the next one.

It is pure: no clock, no files, no processes. When window w has ended, `settle` settles window w - 1
(its requests had one more window to finish) and `next_allocation` draws window w + 1 with the
context of window w. Random numbers come from (seed, window), so that a loop restored from its
`state` decides as the one that was killed would have.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import SERVING, Arm, Origin, State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry, RegistryError
from autopoiesis.orchestrator.allocator import (
    Layout,
    Limits,
    allocate,
    concentrated,
    lay_out,
    members_of,
    with_trial,
)
from autopoiesis.orchestrator.bandit import BanditSettings
from autopoiesis.orchestrator.beliefs import Beliefs
from autopoiesis.orchestrator.context import describe
from autopoiesis.orchestrator.feedback import Played, TwinCorrection, regret_of, twin_errors
from autopoiesis.orchestrator.grounds import Grounds, explain
from autopoiesis.orchestrator.holding import keep
from autopoiesis.orchestrator.lifecycle import Lifecycle, LifecycleSettings, Move
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.rails import eligible, in_force
from autopoiesis.orchestrator.rehearsal import WARMUP_WINDOWS, Rehearsal, affordable
from autopoiesis.orchestrator.reputation import reputation
from autopoiesis.orchestrator.reward import (
    Judged,
    cell_rows,
    fresh_shards,
    judge,
    shard_load,
    utility_by_arm,
    window_row,
)
from autopoiesis.orchestrator.shadow import Shadow, ShadowSettings
from autopoiesis.orchestrator.triggers import Trigger, Triggers, TriggerSettings
from autopoiesis.telemetry.database import TelemetryError
from autopoiesis.telemetry.drift import DriftMonitor
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CellRow,
    EventRow,
    GuardRails,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.twin.simulation import ReplicaSpec

VERSION = 1
"""Of the saved state; another version starts afresh."""
KEEP_WINDOWS = WARMUP_WINDOWS + 2
"""Windows of requests that an observation must reach back."""
REHEARSALS = 4
"""Replays per arm and window: when it has ended and when it settles, each also under stress."""
REPUTATION_WEIGHT = 4.0
"""Observations that an arm's reputation is worth until the first window has ended."""
TRUSTED = 0.5
"""Trust in the twin from which on one cell is sampled too: every arm is informed every window."""
EXPLORATION = (0.25, 0.05)
"""Most of the cells that go to challengers, with no and with full trust in the twin."""
LOAD_KEEP = 0.8
"""What is left of a shard's load after a window; shards move when their loads change."""
TEMPER = 0.5
"""Share of what is believed that outlives a drift of rewards or of the twin's error."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How the loop works; each part's own settings within."""

    cell_replicas: int = 2
    twin: bool = True
    """Whether windows are replayed in the twin under every arm."""
    replayed_requests: int = 100_000
    """Most requests that the twin simulates per window."""
    bandit: BanditSettings = field(default_factory=BanditSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
    shadow: ShadowSettings = field(default_factory=ShadowSettings)
    triggers: TriggerSettings = field(default_factory=TriggerSettings)


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of a window, and what follows from it."""

    window: WindowRow
    cells: tuple[CellRow, ...]
    estimates: tuple[ArmEstimate, ...]
    twin_errors: tuple[TwinErrorRow, ...]
    events: tuple[EventRow, ...]
    trigger: Trigger | None


@dataclass(slots=True)
class _Window:
    """What must be remembered of a window until it settles."""

    allocation: Allocation
    vector: NDArray[np.float64]
    """The standardised context under which it was decided."""
    started_s: float = 0.0
    ended_s: float = 0.0
    context: dict[str, float] = field(default_factory=dict[str, float])


class WindowLoop:
    """The orchestrator's mind."""

    def __init__(
        self,
        registry: Registry,
        objective: Objective,
        seed: int,
        settings: LoopSettings | None = None,
        state: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.registry = registry
        self.objective = objective
        self.settings = settings or LoopSettings()
        self.seed = seed
        self.beliefs = Beliefs(self.settings.bandit)
        self.lifecycle = Lifecycle(self.settings.lifecycle)
        self.shadow = Shadow(self.settings.shadow)
        self.triggers = Triggers(self.settings.triggers)
        self.correction = TwinCorrection()
        self.drift = DriftMonitor()
        self._load = np.zeros(SHARDS)
        self._windows: dict[int, _Window] = {}
        self._events: list[EventRow] = []
        self.rails = GuardRails()
        self.proposed: tuple[Allocation, str] | None = None
        """What would serve the next window, were it not a dry run, and why."""
        self._grounds = Grounds("", None, None, {}, {})
        self._withheld: set[tuple[str, State]] = set()
        if state:
            self._restore(state)
        self._meet_arms()

    # --- what came of it ----------------------------------------------------------------------

    def settle(self, seen: Observation) -> Settled | None:
        """Take in that a window has ended; return the one before it, settled, if there is one."""
        self._meet_arms()
        now = self._windows.get(seen.window)
        if now is not None:
            self._end(now, seen)
        window = seen.window - 1
        ended = window in self._windows and self._windows[window].ended_s > 0.0
        if now is not None:
            self._foresee(now, seen)
            self._try_in_shadow(now, seen)
        settled = self._settle(window, seen) if ended else None
        self._windows = {w: kept for w, kept in self._windows.items() if w >= window}
        return settled

    def _end(self, now: _Window, seen: Observation) -> None:
        """Note what can be said of a window at once: its context, its load, and great harm."""
        now.started_s, now.ended_s = seen.started_s, seen.ended_s
        latest = judge(seen.outcome, self.objective, seen.started_s, seen.ended_s, seen.ended_s)
        rows = cell_rows(latest, now.allocation)
        self._move(self.lifecycle.guard(self.registry.serving(), rows), seen)
        now.context = describe(latest, seen.replicas)
        self.beliefs.enter(now.context)
        self._load = LOAD_KEEP * self._load + shard_load(latest)

    def _settle(self, window: int, seen: Observation) -> Settled:
        kept = self._windows[window]
        before = self._windows.get(window - 1)
        fresh = fresh_shards(kept.allocation, before.allocation if before else None)
        judged = judge(
            seen.outcome, self.objective, kept.started_s, kept.ended_s, seen.ended_s, fresh
        )
        rows = cell_rows(judged, kept.allocation)
        played = self._played(rows, kept.vector)
        shares = {arm: float(p.requests) for arm, p in played.items()}
        twin, lean = self._rehearse(kept, seen, played)
        values = {arm: u for arm, j in twin.items() if (u := j.mean_utility()) is not None}
        estimates = self.correction.learn(values, played) if values else {}
        trust, weight = (self.correction.trust, self.correction.weight) if estimates else (0.0, 0.0)
        residual = self.beliefs.learn(rows, kept.vector, estimates, lean, trust, weight)
        regret = regret_of(estimates, shares, twin, self.correction) if estimates else None
        errors = twin_errors(window, judged, twin, shares)
        drifted = self._watch(seen, residual, errors)
        self.lifecycle.remember(estimates)
        self._let_arms_rise_and_fall(seen, kept, utility_by_arm(rows), estimates, drifted)
        self._compare(seen, kept, utility_by_arm(rows), values)
        best = max(estimates.values()) if estimates else judged.mean_utility()
        low = regret.low if regret else None
        trigger = self.triggers.consider(window, seen.ended_s, low, best, drifted)
        if trigger is not None and self.rails.hold:
            order = in_force(self.rails, self._name)
            self._say(seen, "synthesis", trigger.kind, f"not asked ({order}): {trigger.why}")
            trigger = None
        elif trigger is not None:
            self._say(seen, "synthesis", trigger.kind, trigger.why)
        interval = (regret.value, regret.low, regret.high) if regret else None
        events, self._events = self._events, []
        return Settled(
            window=window_row(
                judged, window, self.objective, kept.context, interval, drifted, weight
            ),
            cells=tuple(rows),
            estimates=tuple(self._estimate_rows(values, played, estimates, seen.replicas)),
            twin_errors=tuple(errors),
            events=tuple(events),
            trigger=trigger,
        )

    def _played(self, rows: Sequence[CellRow], vector: NDArray[np.float64]) -> dict[str, Played]:
        propensity = {row.arm_id: row.propensity for row in rows}
        predicted = self.beliefs.means(vector)
        return {
            arm: Played(utility, propensity[arm], requests, predicted[arm])
            for arm, (utility, requests) in utility_by_arm(rows).items()
            if arm in predicted
        }

    def _foresee(self, now: _Window, seen: Observation) -> None:
        """Let the twin say at once what the window that has just ended means for each arm."""
        twin, lean = self._rehearse(now, seen, now.allocation.arms())
        own = self.correction.own
        values = {a: u + own(a) for a, j in twin.items() if (u := j.mean_utility()) is not None}
        mean = float(np.mean([*values.values()])) if values else 0.0
        self.beliefs.foresight = {a: u - mean + lean.get(a, 0.0) for a, u in values.items()}
        self.beliefs.foresight_weight = self.correction.weight

    def _try_in_shadow(self, now: _Window, seen: Observation) -> None:
        """Let the arms in shadow decide the window that has just ended, beside the arm that served most."""
        arms = [a.id for a in self.registry.fast() if a.state is State.SHADOW]
        if not arms:
            return
        live = max(now.allocation.arms(), key=now.allocation.share)
        rehearsal = Rehearsal(seen, now.started_s, now.ended_s, self.objective, self.seed)
        judged: dict[str, Judged] = {}
        if requests := rehearsal.requests():
            room = self.settings.replayed_requests - requests
            tried = (live, *affordable(arms, requests, room))
            judged = rehearsal.under({arm: self.registry.program(arm) for arm in tried})
        self._move(self.shadow.review(arms, judged, (live, self._name(live)), seen.replicas), seen)

    def _rehearse(
        self, kept: _Window, seen: Observation, played: Collection[str]
    ) -> tuple[dict[str, Judged], dict[str, float]]:
        """Replay the window under as many arms as the budget allows, those that played first."""
        rehearsal = Rehearsal(seen, kept.started_s, kept.ended_s, self.objective, self.seed)
        requests = rehearsal.requests()
        if not self.settings.twin or not requests:
            return {}, {}
        mean = self.beliefs.means()
        known = {*(a.id for a in self.registry.serving()), *played}
        order = sorted(known, key=lambda a: (a not in played, -mean.get(a, 0.0), a))
        arms = affordable(order, REHEARSALS * requests, self.settings.replayed_requests)
        programs = {arm: self.registry.program(arm) for arm in arms}
        return rehearsal.under(programs), rehearsal.lean(programs)

    def _watch(
        self, seen: Observation, residual: float | None, errors: Sequence[TwinErrorRow]
    ) -> tuple[str, ...]:
        """Look for drift; forget faster where what is believed has become wrong."""
        streams = {"context": float(np.sqrt(np.mean(self.beliefs.vector[1:] ** 2)))}
        if residual is not None:
            streams["reward"] = residual
        for error in errors:
            if error.metric == "utility":
                streams["twin"] = error.observed - error.twin
        drifted = self.drift.observe(streams)
        for name in drifted:
            self._say(seen, "drift", name, f"the mean of {name} has changed")
        if {"reward", "twin"} & set(drifted):
            self.beliefs.temper(TEMPER)
        return drifted

    # --- arms ---------------------------------------------------------------------------------

    def welcome(self, arm_id: str, like: str | None, gain: float, pseudo_count: float) -> None:
        """Believe what the race said of a new arm: `gain` in utility over the arm `like`."""
        self._meet_arms()
        known = like if like in self.beliefs.arms else None
        self.beliefs.bandit.warm_start(arm_id, known, gain, pseudo_count)

    def follow_clock(self, by_s: float) -> None:
        """Move all times that are remembered: the clock was set by so much."""
        for window in self._windows.values():
            if window.ended_s > 0.0:
                window.started_s += by_s
                window.ended_s += by_s
        self.triggers.follow_clock(by_s)

    def _meet_arms(self) -> None:
        """Know the arms that serve or may serve again, and no others."""
        kept = SERVING | {State.SHADOW, State.QUARANTINED}
        self.beliefs.meet([a.id for a in self.registry.fast() if a.state in kept])

    def _let_arms_rise_and_fall(
        self,
        seen: Observation,
        kept: _Window,
        utility: Mapping[str, tuple[float, int]],
        estimates: Mapping[str, float],
        drifted: Sequence[str],
    ) -> None:
        means = self.beliefs.means(kept.vector)
        control = self._control(means).id
        baseline = estimates.get(control, means[control])
        self._move(self.lifecycle.review(self.registry.serving(), utility, baseline), seen)
        if drifted:
            self._move(self.lifecycle.second_chances(self.registry.fast(), means), seen)
        self._move(self.lifecycle.superfluous(self.registry.fast(), means), seen)

    def _compare(
        self,
        seen: Observation,
        kept: _Window,
        utility: Mapping[str, tuple[float, int]],
        twin: Mapping[str, float],
    ) -> None:
        """Go on with the switchback, if one runs; what the twin says of the control evens out load."""
        switchback = self.lifecycle.switchback
        if switchback is None:
            return
        window = kept.allocation.window
        served, _ = utility.get(switchback.arm_of(window) or "", (None, 0))
        control = twin.get(switchback.control_id) if twin else 0.0
        gain = None if served is None or control is None else served - control
        verdict = self.lifecycle.compare(window, gain)
        if verdict:
            self._say(seen, "arm", self._name(switchback.arm_id), verdict)

    def _move(self, moves: Sequence[Move], seen: Observation) -> None:
        for move in moves:
            if self.rails.hold:
                self._withhold(move, seen)
                continue
            try:
                arm = self.registry.move(move.arm_id, move.state, move.reason)
                self._say(seen, "arm", arm.name, f"{move.state}: {move.reason}")
            except (RegistryError, TelemetryError) as error:
                self._say(seen, "arm", self._name(move.arm_id), f"not moved: {error}")
                continue
            if move.state is State.QUARANTINED:
                self.lifecycle.forget(move.arm_id)
        self.lifecycle.abandon(frozenset(a.id for a in self.registry.serving()))

    def _withhold(self, move: Move, seen: Observation) -> None:
        """Say once what would be done to an arm, were it not for an operator's order."""
        if (move.arm_id, move.state) not in self._withheld:
            self._withheld.add((move.arm_id, move.state))
            order = in_force(self.rails, self._name)
            told = f"would be {move.state} ({order}): {move.reason}"
            self._say(seen, "arm", self._name(move.arm_id), told)

    def control(self) -> Arm:
        """Return the arm that is the baseline: the human one believed to be best."""
        return self._control(self.beliefs.means())

    def _control(self, means: Mapping[str, float]) -> Arm:
        """Return the arm to compare with: the human one believed to be best."""
        serving = self.registry.serving()
        human = [a for a in serving if a.origin is Origin.HUMAN] or list(serving)
        return max(human, key=lambda a: means.get(a.id, 0.0))

    def _name(self, arm_id: str) -> str:
        return self.registry.get(arm_id).name

    def _say(self, seen: Observation, kind: str, subject: str, message: str) -> None:
        self._events.append(EventRow(seen.ended_s, kind, seen.window, subject, message))

    # --- who serves next ----------------------------------------------------------------------

    def constrain(self, rails: GuardRails) -> None:
        """Decide from now on within what an operator has ordered."""
        self.rails = rails
        self._withheld.clear()
        if rails != GuardRails():
            self.lifecycle.switchback = None

    def next_allocation(self, window: int, replicas: Sequence[ReplicaSpec]) -> Allocation:
        """Decide who serves `window` on the replicas that are there.

        In a dry run, `proposed` is what would serve, and why. Raises ValueError: no replica is there,
        or no arm serves.
        """
        self._meet_arms()
        serving = frozenset(a.id for a in self.registry.serving())
        self.lifecycle.abandon(serving)
        self.proposed = None
        held = self.rails.held
        if held is None:
            allocation, self._grounds = self._draw(window, replicas)
        else:
            if self.rails.dry_run:
                drawn, grounds = self._draw(window, replicas)
                told = explain(drawn, self._last_allocation(), grounds, self._name)
                self.proposed = drawn, told
            allocation = keep(held, window, members_of(replicas), serving, self.control().id)
            self._grounds = self._grounds_of(window, {})
        self._windows[window] = _Window(allocation, self.beliefs.vector)
        return allocation

    def _draw(self, window: int, replicas: Sequence[ReplicaSpec]) -> tuple[Allocation, Grounds]:
        layout = self._layout(replicas)
        cells = len(layout.groups)
        if self.settings.twin and self.beliefs.context is None and not self.beliefs.foresight:
            programs = {a.id: self.registry.program(a.id) for a in self.registry.serving()}
            self.beliefs.foresight = reputation(programs, replicas, self.objective, self.seed)
            self.beliefs.foresight_weight = REPUTATION_WEIGHT
        rng = np.random.default_rng([self.seed, window])
        limits = self.lifecycle.limits(self._eligible())
        probabilities = self._probabilities(cells, limits)
        if limits.unconfirmed and self.rails == GuardRails():
            wanted = self._drawn(cells, None)
            self.lifecycle.want(window, limits.unconfirmed, wanted, self.control().id, rng)
        switchback = self.lifecycle.switchback
        sole = self.rails.only or (switchback.arm_of(window) if switchback else None)
        if sole:
            probabilities, limits = {sole: 1.0}, Limits()
        drawn = allocate(window, layout, probabilities, limits, self._last_allocation(), rng)
        return drawn, self._grounds_of(window, probabilities)

    def _grounds_of(self, window: int, probabilities: Mapping[str, float]) -> Grounds:
        switchback = self.lifecycle.switchback
        tried = switchback if switchback and switchback.arm_of(window) else None
        return Grounds(
            order=in_force(self.rails, self._name),
            switchback=(tried.arm_id, tried.control_id) if tried else None,
            trial=self.lifecycle.on_trial(self._eligible()),
            probabilities=probabilities,
            states={a.id: a.state for a in self.registry.fast()},
        )

    def _eligible(self) -> tuple[Arm, ...]:
        return eligible(self.registry.serving(), self.rails)

    def _layout(self, replicas: Sequence[ReplicaSpec]) -> Layout:
        return lay_out(
            members_of(replicas), self._last_allocation(), self._load, self.settings.cell_replicas
        )

    def _last_allocation(self) -> Allocation | None:
        last = self._windows.get(max(self._windows, default=-1))
        return last.allocation if last else None

    def _probabilities(self, cells: int, limits: Limits) -> dict[str, float]:
        """Return each serving arm's probability per cell, few challengers among them."""
        without, trusted = EXPLORATION
        exploration = without + (trusted - without) * self._trust
        last = self._last_allocation()
        incumbent = max(last.arms(), key=last.share) if last else None
        drawn = self._drawn(cells, limits)
        trial = self.lifecycle.on_trial(self._eligible()) if cells > 1 else None
        if trial is not None:
            drawn = with_trial(drawn, trial, cells)
        return concentrated(drawn, limits, cells, exploration, incumbent)

    def _drawn(self, cells: int, limits: Limits | None) -> dict[str, float]:
        return self.beliefs.probabilities(
            np.random.default_rng([self.seed, max(self._windows, default=-1) + 1, 1]),
            eligible=[a.id for a in self._eligible()],
            caps=limits.caps(cells) if limits else None,
            sample=cells > 1 or self._trust >= TRUSTED,
        )

    @property
    def _trust(self) -> float:
        return self.correction.trust if self.settings.twin else 0.0

    def why(self, allocation: Allocation, previous: Allocation | None) -> str:
        """Say in one line what the allocation drawn last does, and why."""
        return explain(allocation, previous, self._grounds, self._name)

    def _estimate_rows(
        self,
        twin: Mapping[str, float],
        played: Mapping[str, Played],
        estimates: Mapping[str, float],
        replicas: Sequence[ReplicaSpec],
    ) -> list[ArmEstimate]:
        serving = self.registry.serving()
        p: dict[str, float] = {}
        if serving and replicas:
            cells = len(self._layout(replicas).groups)
            p = self._probabilities(cells, self.lifecycle.limits(self._eligible()))
            p = {self.rails.only: 1.0} if self.rails.only else p
        mean, sd = self.beliefs.means(), self.beliefs.deviations()
        return [
            ArmEstimate(
                arm_id=arm,
                twin_utility=twin.get(arm),
                observed_utility=played[arm].utility if arm in played else None,
                estimate=estimates.get(arm),
                posterior_mean=mean[arm],
                posterior_sd=sd[arm],
                probability=p.get(arm, 0.0),
            )
            for arm in self.beliefs.arms
        ]

    # --- memory -------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all that the loop knows as named arrays."""
        plain = {
            "version": VERSION,
            "load": self._load.tolist(),
            "correction": self.correction.to_dict(),
            "lifecycle": self.lifecycle.to_dict(),
            "shadow": self.shadow.to_dict(),
            "triggers": self.triggers.to_dict(),
            "windows": [_to_plain(kept) for kept in self._windows.values()],
        }
        loop = np.frombuffer(orjson.dumps(plain), np.uint8).copy()
        return {**self.beliefs.to_arrays(), **self.drift.state(), "loop": loop}

    def _restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        plain = orjson.loads(np.asarray(state["loop"], np.uint8).tobytes())
        if plain["version"] != VERSION:
            raise ValueError(f"loop state has version {plain['version']}, this reads {VERSION}")
        self.beliefs = Beliefs.from_arrays(state, self.settings.bandit)
        self.drift = DriftMonitor.restored(state)
        self.correction = TwinCorrection.from_dict(plain["correction"])
        self.lifecycle.restore(plain["lifecycle"])
        self.shadow.restore(plain.get("shadow", {}))
        self.triggers.restore(plain["triggers"])
        self._load = np.array(plain["load"], np.float64)
        kept = [_from_plain(w) for w in plain["windows"]]
        self._windows = {k.allocation.window: k for k in kept}


def _to_plain(kept: _Window) -> dict[str, Any]:
    cells = [[c.arm_id, c.replicas, c.shards, c.propensity] for c in kept.allocation.cells]
    return {
        "window": kept.allocation.window,
        "cells": cells,
        "vector": kept.vector.tolist(),
        "bounds_s": [kept.started_s, kept.ended_s],
        "context": kept.context,
    }


def _from_plain(plain: Mapping[str, Any]) -> _Window:
    cells = tuple(Cell(a, tuple(r), tuple(s), p) for a, r, s, p in plain["cells"])
    vector = np.array(plain["vector"], np.float64)
    started_s, ended_s = plain["bounds_s"]
    return _Window(Allocation(plain["window"], cells), vector, started_s, ended_s, plain["context"])
