"""The window loop: what came of a window, what is believed now, who serves the next one.

It is pure: no clock, no files, no processes. When window w has ended, `settle` settles window w - 1
(its requests had one more window to finish) and `next_allocation` draws window w + 1 with the
context of window w. Random numbers come from (seed, window), so that a loop restored from its
`state` decides as the one that was killed would have.
"""

from collections.abc import Mapping, Sequence
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
    moved_shards,
)
from autopoiesis.orchestrator.bandit import BanditSettings, LinearThompson
from autopoiesis.orchestrator.context import FEATURES, Scaler, context_of
from autopoiesis.orchestrator.feedback import (
    Played,
    TwinCorrection,
    affordable,
    regret_of,
    replay_window,
    twin_errors,
)
from autopoiesis.orchestrator.lifecycle import Lifecycle, LifecycleSettings, Move
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.reward import (
    Judged,
    cell_rows,
    fresh_shards,
    judge,
    utility_by_arm,
    window_row,
)
from autopoiesis.orchestrator.triggers import Trigger, Triggers, TriggerSettings
from autopoiesis.telemetry.drift import DriftMonitor
from autopoiesis.telemetry.records import ArmEstimate, CellRow, EventRow, TwinErrorRow, WindowRow
from autopoiesis.twin.simulation import ReplicaSpec

VERSION = 1
"""Of the saved state; another version starts afresh."""
WARMUP_WINDOWS = 2
"""Windows that the twin replays before the one that counts."""
KEEP_WINDOWS = WARMUP_WINDOWS + 2
"""Windows of requests that an observation must reach back."""
LEVEL = "level"
"""Name under which the level of all arms is learned."""
TRUSTED = 0.5
"""Trust in the twin from which on one cell is sampled too: every arm is informed every window."""
EXPLORATION = (0.25, 0.05)
"""Most of the cells that go to challengers, with no and with full trust in the twin."""
LOAD_RATE = 0.2
"""How fast the shards' shares of the load follow; shards move when they change."""
HALF_WEIGHT_REQUESTS = 20
"""Requests of a cell at which its utility is worth half an observation."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How the loop works; each part's own settings within."""

    cell_replicas: int = 2
    twin: bool = True
    """Whether windows are replayed in the twin under every arm."""
    replayed_requests: int = 60_000
    """Most requests that the twin simulates per window."""
    stress: float = 1.5
    """Speed at which windows are replayed once more: which arm would hold if the load rose?"""
    stress_weight: float = 0.1
    """Weight of that answer; it decides where arms are equal, as they are while load is low."""
    temper: float = 0.5
    """Share of what the bandit knows that it keeps when rewards or the twin's errors drift."""
    bandit: BanditSettings = field(default_factory=BanditSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
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
        self.bandit = LinearThompson(FEATURES, self.settings.bandit)
        self._level = LinearThompson(FEATURES, self.settings.bandit)
        self._level.add(LEVEL)
        self.lifecycle = Lifecycle(self.settings.lifecycle)
        self.triggers = Triggers(self.settings.triggers)
        self.correction = TwinCorrection()
        self.drift = DriftMonitor()
        self._scaler = Scaler()
        self._context: dict[str, float] | None = None
        self._load = np.zeros(SHARDS)
        self._windows: dict[int, _Window] = {}
        self._events: list[EventRow] = []
        if state:
            self._restore(state)
        self._meet_arms()

    # --- what came of it ----------------------------------------------------------------------

    def settle(self, seen: Observation) -> Settled | None:
        """Take in that a window has ended; return the one before it, settled, None if there is none."""
        self._events = []
        self._meet_arms()
        now = self._windows.get(seen.window)
        if now is not None:
            now.started_s, now.ended_s = seen.started_s, seen.ended_s
            latest = judge(seen.outcome, self.objective, seen.started_s, seen.ended_s, seen.ended_s)
            guarded = self.lifecycle.guard(
                self.registry.serving(), cell_rows(latest, now.allocation)
            )
            self._move(guarded, seen.window, seen.ended_s)
            now.context = self._context = _context(latest, seen.replicas)
            self._scaler.update(self._context)
            self._load += LOAD_RATE * (_load(latest) - self._load)
        window = seen.window - 1
        settled = self._settle(window, seen) if self._is_over(window) else None
        self._windows = {w: kept for w, kept in self._windows.items() if w >= window}
        return settled

    def _is_over(self, window: int) -> bool:
        return window in self._windows and self._windows[window].ended_s > 0.0

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
        twin = self._replay(kept, seen, set(played))
        values = {arm: u for arm, j in twin.items() if (u := j.mean_utility()) is not None}
        estimates = self.correction.learn(values, played) if values else {}
        lean = self._lean(kept, seen, list(values))
        residuals = self._learn(rows, kept.vector, estimates, lean)
        regret = regret_of(estimates, shares, twin, self.correction) if estimates else None
        errors = twin_errors(window, judged, twin, shares)
        drifted = self._watch(seen, residuals, errors)
        self._live_on(window, seen.ended_s, utility_by_arm(rows), estimates, kept, drifted)
        trigger = self.triggers.consider(
            window,
            seen.ended_s,
            regret.low if regret else None,
            max(estimates.values()) if estimates else judged.mean_utility(),
            drifted,
        )
        if trigger is not None:
            self._say(seen.ended_s, "synthesis", window, trigger.kind, trigger.why)
        interval = (regret.value, regret.low, regret.high) if regret else None
        weight = self.correction.weight if estimates else 0.0
        return Settled(
            window=window_row(
                judged, window, self.objective, kept.context, interval, drifted, weight
            ),
            cells=tuple(rows),
            estimates=tuple(self._estimate_rows(values, played, estimates, seen.replicas)),
            twin_errors=tuple(errors),
            events=tuple(self._events),
            trigger=trigger,
        )

    def _played(self, rows: Sequence[CellRow], vector: NDArray[np.float64]) -> dict[str, Played]:
        propensity = {row.arm_id: row.propensity for row in rows}
        predicted = self._means(vector)
        return {
            arm: Played(utility, propensity[arm], requests, predicted[arm])
            for arm, (utility, requests) in utility_by_arm(rows).items()
            if arm in predicted
        }

    def _replay(self, kept: _Window, seen: Observation, played: set[str]) -> dict[str, Judged]:
        """Replay the window in the twin under as many arms as the budget allows."""
        counted = np.searchsorted(seen.trace.arrival_s, [kept.started_s, kept.ended_s])
        if not self.settings.twin or not seen.replicas or counted[0] == counted[1]:
            return {}
        first, last = np.searchsorted(seen.trace.arrival_s, [_warm_s(kept, seen), seen.ended_s])
        serving = [a.id for a in self.registry.serving()]
        mean = self._means()
        promising = sorted(serving, key=lambda a: (a not in played, -mean.get(a, 0.0)))
        gone = [a for a in played if a not in serving and a in self.bandit.arms]
        budget = self.settings.replayed_requests // (2 if self.settings.stress_weight else 1)
        arms = affordable(serving + gone, gone + promising, int(last - first), budget)
        return self._simulate(kept, seen, arms, 1.0)

    def _lean(self, kept: _Window, seen: Observation, arms: Sequence[str]) -> dict[str, float]:
        """Return by how much to prefer each arm for what it would do under more load."""
        if not arms or not self.settings.stress_weight:
            return {}
        stressed = self._simulate(kept, seen, arms, self.settings.stress)
        utility = {a: u for a, j in stressed.items() if (u := j.mean_utility()) is not None}
        mean = float(np.mean([*utility.values()])) if utility else 0.0
        return {arm: self.settings.stress_weight * (u - mean) for arm, u in utility.items()}

    def _simulate(
        self, kept: _Window, seen: Observation, arms: Sequence[str], speed: float
    ) -> dict[str, Judged]:
        return replay_window(
            seen.trace,
            seen.replicas,
            {arm: self.registry.program(arm) for arm in arms},
            self.objective,
            (_warm_s(kept, seen), kept.started_s, kept.ended_s, seen.ended_s),
            self.seed,
            speed,
        )

    def _learn(
        self,
        rows: Sequence[CellRow],
        vector: NDArray[np.float64],
        estimates: Mapping[str, float],
        lean: Mapping[str, float],
    ) -> dict[str, float]:
        """Teach the bandit a window; return the mean residual of what was observed.

        The bandit learns how far each arm is from the level of the window, which is the mean of all
        arms' estimates, or without them what was to be expected in this context. What a window does
        to all arms alike is most of the noise, and would hide which arm is better.
        """
        self.bandit.tick()
        self._level.tick()
        seen = [row for row in rows if row.utility is not None and row.arm_id in self.bandit.arms]
        observed = [row.utility for row in seen if row.utility is not None]
        if not observed:
            return {}
        level = float(np.mean([*estimates.values()] or observed))
        self._level.begin_at(level)
        expected = float(vector @ self._level.weights(LEVEL))
        self._level.update(LEVEL, vector, level)
        base = level if estimates else expected
        trust = self.correction.trust if estimates else 0.0
        residual = total = 0.0
        for row, utility in zip(seen, observed, strict=True):
            weight = row.requests / (row.requests + HALF_WEIGHT_REQUESTS)
            residual += weight * (
                utility - expected - float(vector @ self.bandit.weights(row.arm_id))
            )
            total += weight
            word = trust * estimates.get(row.arm_id, utility) + (1.0 - trust) * utility
            self.bandit.update(row.arm_id, vector, word - base + lean.get(row.arm_id, 0.0), weight)
        played = {row.arm_id for row in seen}
        for arm, estimate in estimates.items():
            if arm not in played and arm in self.bandit.arms:
                weight = self.correction.weight
                advantage = estimate - base + lean.get(arm, 0.0)
                self.bandit.update(arm, vector, advantage, weight, imputed=True)
        return {"reward": residual / total}

    def _watch(
        self, seen: Observation, residuals: Mapping[str, float], errors: Sequence[TwinErrorRow]
    ) -> tuple[str, ...]:
        """Look for drift; forget faster where what is known has become wrong."""
        distance = self._scaler.standardise(self._context)[1:]
        streams = {**residuals, "context": float(np.sqrt(np.mean(distance**2)))}
        for error in errors:
            if error.metric == "utility":
                streams["twin"] = error.observed - error.twin
        drifted = self.drift.observe(streams)
        for name in drifted:
            self._say(seen.ended_s, "drift", seen.window, name, f"the mean of {name} has changed")
        if {"reward", "twin"} & set(drifted):
            self.bandit.temper(self.settings.temper)
            self._level.temper(self.settings.temper)
        return drifted

    # --- arms ---------------------------------------------------------------------------------

    def welcome(self, arm_id: str, like: str | None, gain: float, pseudo_count: float) -> None:
        """Believe what the race said of a new arm: `gain` in utility over the arm `like`."""
        self._meet_arms()
        known = like if like in self.bandit.arms else None
        self.bandit.warm_start(arm_id, known, gain, pseudo_count)

    def _meet_arms(self) -> None:
        """Let the bandit know the arms that serve or may serve again, and no others."""
        kept = {a.id for a in self.registry.all() if a.state in SERVING | {State.QUARANTINED}}
        for arm in [a for a in self.bandit.arms if a not in kept]:
            self.bandit.remove(arm)
        known = [self.bandit.weights(a) for a in self.bandit.arms]
        mean = np.mean(known, axis=0) if known else 0.0
        for arm in self.registry.all():
            if arm.id in kept and arm.id not in self.bandit.arms:
                self.bandit.add(arm.id, mean)

    def _live_on(
        self,
        window: int,
        at_s: float,
        utility: Mapping[str, tuple[float, int]],
        estimates: Mapping[str, float],
        kept: _Window,
        drifted: Sequence[str],
    ) -> None:
        means = self._means(kept.vector)
        control = self._control(means)
        baseline = estimates.get(control.id, means[control.id])
        self._move(self.lifecycle.review(self.registry.serving(), utility, baseline), window, at_s)
        if drifted:
            self._move(self.lifecycle.second_chances(self.registry.all(), means), window, at_s)
        self._move(self.lifecycle.superfluous(self.registry.all(), means), window, at_s)
        switchback = self.lifecycle.switchback
        if switchback is not None:
            served = switchback.arm_of(window)
            verdict = self.lifecycle.compare(window, utility.get(served or "", (None, 0))[0])
            if verdict:
                self._say(at_s, "arm", window, self._name(switchback.arm_id), verdict)

    def _move(self, moves: Sequence[Move], window: int, at_s: float) -> None:
        for move in moves:
            try:
                arm = self.registry.move(move.arm_id, move.state, move.reason)
                self._say(at_s, "arm", window, arm.name, f"{move.state}: {move.reason}")
            except RegistryError as error:
                self._say(at_s, "arm", window, self._name(move.arm_id), f"not moved: {error}")
        self.lifecycle.abandon(frozenset(a.id for a in self.registry.serving()))

    def _means(self, vector: NDArray[np.float64] | None = None) -> dict[str, float]:
        x = self._scaler.standardise(self._context) if vector is None else vector
        level = float(x @ self._level.weights(LEVEL))
        return {arm: level + float(x @ self.bandit.weights(arm)) for arm in self.bandit.arms}

    def _control(self, means: Mapping[str, float]) -> Arm:
        """Return the arm to compare with: the human one believed to be best."""
        serving = self.registry.serving()
        human = [a for a in serving if a.origin is Origin.HUMAN] or list(serving)
        return max(human, key=lambda a: means.get(a.id, 0.0))

    # --- who serves next ----------------------------------------------------------------------

    def _drawn(self, cells: int, limits: Limits | None) -> dict[str, float]:
        """Return each serving arm's probability per cell in the context of the last window."""
        return self.bandit.probabilities(
            self._scaler.standardise(self._context),
            np.random.default_rng([self.seed, max(self._windows, default=-1) + 1, 1]),
            eligible=[a.id for a in self.registry.serving()],
            caps=limits.caps(cells) if limits else None,
            sample=cells > 1 or (self.settings.twin and self.correction.trust >= TRUSTED),
        )

    def _exploration(self) -> float:
        without, trusted = EXPLORATION
        trust = self.correction.trust if self.settings.twin else 0.0
        return without + (trusted - without) * trust

    def _layout(self, replicas: Sequence[ReplicaSpec]) -> Layout:
        return lay_out(
            members_of(replicas), self._last_allocation(), self._load, self.settings.cell_replicas
        )

    def _last_allocation(self) -> Allocation | None:
        last = self._windows.get(max(self._windows, default=-1))
        return last.allocation if last else None

    def next_allocation(
        self, window: int, replicas: Sequence[ReplicaSpec], only: str | None = None
    ) -> Allocation:
        """Draw who serves `window` on the replicas that are there.

        `only` is an arm that the operator gives everything.

        Raises:
            ValueError: no replica is there, or no arm serves.
        """
        self._meet_arms()
        layout = self._layout(replicas)
        limits = self.lifecycle.limits(self.registry.serving())
        rng = np.random.default_rng([self.seed, window])
        cells = len(layout.groups)
        probabilities = concentrated(self._drawn(cells, limits), limits, cells, self._exploration())
        if limits.unconfirmed and only is None:
            wanted, control = self._drawn(cells, None), self._control(self._means()).id
            self.lifecycle.want(window, limits.unconfirmed, wanted, control, rng)
        switchback = self.lifecycle.switchback
        sole = only or (switchback.arm_of(window) if switchback else None)
        if sole is not None:
            probabilities, limits = {sole: 1.0}, Limits()
        allocation = allocate(window, layout, probabilities, limits, self._last_allocation(), rng)
        self._windows[window] = _Window(allocation, self._scaler.standardise(self._context))
        return allocation

    def why(self, allocation: Allocation, previous: Allocation | None) -> str:
        """Say in one line what an allocation does."""
        held = {a: len(allocation.group(a)) for a in allocation.arms()}
        most = sorted(held, key=lambda a: -held[a])
        text = ", ".join(f"{self._name(a)} on {held[a]}" for a in most)
        if self.lifecycle.switchback and self.lifecycle.switchback.arm_of(allocation.window):
            text += " (switchback)"
        moved = moved_shards(previous, allocation) if previous else 0
        return f"{text}; {moved} shards moved" if moved else text

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
            limits, cells = self.lifecycle.limits(serving), len(self._layout(replicas).groups)
            p = concentrated(self._drawn(cells, limits), limits, cells, self._exploration())
        mean = self._means()
        _, sd = self.bandit.predict(self._scaler.standardise(self._context))
        return [
            ArmEstimate(
                arm_id=arm,
                twin_utility=twin.get(arm),
                observed_utility=played[arm].utility if arm in played else None,
                estimate=estimates.get(arm),
                posterior_mean=mean[arm],
                posterior_sd=float(sd[i]),
                probability=p.get(arm, 0.0),
            )
            for i, arm in enumerate(self.bandit.arms)
        ]

    # --- memory -------------------------------------------------------------------------------

    def _name(self, arm_id: str) -> str:
        return self.registry.get(arm_id).name

    def _say(self, at_s: float, kind: str, window: int, subject: str, message: str) -> None:
        self._events.append(EventRow(at_s, kind, window, subject, message))

    def state(self) -> dict[str, NDArray[Any]]:
        """Return all that the loop knows as named arrays."""
        plain = {
            "version": VERSION,
            "context": self._context,
            "load": self._load.tolist(),
            "correction": self.correction.to_dict(),
            "lifecycle": self.lifecycle.to_dict(),
            "triggers": self.triggers.to_dict(),
            "windows": [
                {
                    "window": w,
                    "cells": [
                        [c.arm_id, c.replicas, c.shards, c.propensity] for c in k.allocation.cells
                    ],
                    "vector": k.vector.tolist(),
                    "bounds_s": [k.started_s, k.ended_s],
                    "context": k.context,
                }
                for w, k in self._windows.items()
            ],
        }
        arrays: dict[str, NDArray[Any]] = dict(self.drift.state())
        arrays |= {f"bandit/{name}": a for name, a in self.bandit.to_arrays().items()}
        arrays |= {f"level/{name}": a for name, a in self._level.to_arrays().items()}
        arrays |= {f"scaler/{name}": a for name, a in self._scaler.to_arrays().items()}
        arrays["loop"] = np.frombuffer(orjson.dumps(plain), np.uint8).copy()
        return arrays

    def _restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        plain = orjson.loads(np.asarray(state["loop"], np.uint8).tobytes())
        if plain["version"] != VERSION:
            raise ValueError(
                f"loop state has version {plain['version']}, this program reads {VERSION}"
            )
        self.bandit = LinearThompson.from_arrays(_part(state, "bandit/"), self.settings.bandit)
        self._level = LinearThompson.from_arrays(_part(state, "level/"), self.settings.bandit)
        self._scaler = Scaler.from_arrays(_part(state, "scaler/"))
        self.drift = DriftMonitor.restored(state)
        self.correction = TwinCorrection.from_dict(plain["correction"])
        self.lifecycle.restore(plain["lifecycle"])
        self.triggers.restore(plain["triggers"])
        self._context = plain["context"]
        self._load = np.array(plain["load"], np.float64)
        for w in plain["windows"]:
            cells = tuple(Cell(a, tuple(r), tuple(s), p) for a, r, s, p in w["cells"])
            allocation = Allocation(w["window"], cells)
            vector = np.array(w["vector"], np.float64)
            started_s, ended_s = w["bounds_s"]
            self._windows[w["window"]] = _Window(
                allocation, vector, started_s, ended_s, w["context"]
            )


def _part(state: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}


def _warm_s(kept: _Window, seen: Observation) -> float:
    """Return when the replay's warm-up begins."""
    first_s = float(seen.trace.arrival_s[0]) if len(seen.trace) else kept.started_s
    return max(kept.started_s - WARMUP_WINDOWS * (kept.ended_s - kept.started_s), first_s)


def _context(judged: Judged, replicas: Sequence[ReplicaSpec]) -> dict[str, float]:
    """Describe a window by the requests that arrived in it, as far as they have come."""
    o = judged.outcome
    finished = ~np.isnan(o.finished_s)
    # Token-seconds held by the window's own requests over what the fleet could hold: the same
    # number live and in the twin, whatever a replica reports of itself.
    until_s = np.where(finished, np.minimum(o.finished_s, judged.ended_s), judged.ended_s)
    held_s = np.nan_to_num(np.maximum(until_s - o.dispatched_s, 0.0))
    capacity = sum(r.profile.kv_tokens for r in replicas) * judged.duration_s
    held = float((held_s * (o.input_tokens + np.where(finished, o.output_tokens, 0))).sum())
    return context_of(
        o.arrival_s,
        o.input_tokens,
        o.output_tokens[finished],
        o.cached_tokens,
        judged.started_s,
        judged.duration_s,
        held / capacity if capacity > 0.0 else 0.0,
        len(replicas),
    )


def _load(judged: Judged) -> NDArray[np.float64]:
    """Return each shard's share of the window's tokens, (SHARDS,)."""
    o = judged.outcome
    tokens = np.bincount(o.shard, weights=o.input_tokens + o.output_tokens, minlength=SHARDS)
    return tokens / max(float(tokens.sum()), 1.0)
