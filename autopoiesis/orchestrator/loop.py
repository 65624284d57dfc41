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

from autopoiesis.arms.allocation import SHARDS, Allocation
from autopoiesis.arms.arm import SERVING, Arm, State
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.allocator import members_of
from autopoiesis.orchestrator.bandit import BanditSettings
from autopoiesis.orchestrator.beliefs import Beliefs
from autopoiesis.orchestrator.context import describe
from autopoiesis.orchestrator.draw import Draw, Situation
from autopoiesis.orchestrator.feedback import Played, TwinCorrection, regret_of, twin_errors
from autopoiesis.orchestrator.foresight import Foresight
from autopoiesis.orchestrator.grounds import Grounds, explain
from autopoiesis.orchestrator.holding import keep
from autopoiesis.orchestrator.lifecycle import Lifecycle, LifecycleSettings
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.promotion import Promotion
from autopoiesis.orchestrator.rails import eligible, in_force
from autopoiesis.orchestrator.rehearsal import LONG_WARM_UP, LONG_WINDOWS, WARMUP_WINDOWS
from autopoiesis.orchestrator.remembered import Remembered
from autopoiesis.orchestrator.replays import (
    Replays,
    advantages,
    lean_of,
    utilities_of,
    word_of,
)
from autopoiesis.orchestrator.reputation import reputation
from autopoiesis.orchestrator.reward import (
    cell_rows,
    fresh_shards,
    judge,
    shard_load,
    utility_by_arm,
    window_row,
)
from autopoiesis.orchestrator.shadow import Shadow, ShadowSettings
from autopoiesis.orchestrator.triggers import Trigger, Triggers, TriggerSettings
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
KEEP_WINDOWS = max(LONG_WINDOWS + LONG_WARM_UP, WARMUP_WINDOWS + 2)
"""Windows of requests that an observation must reach back."""
REPUTATION_WEIGHT = 4.0
"""Observations that an arm's reputation is worth until the first window has ended."""
LOAD_KEEP = 0.8
"""What is left of a shard's load after a window; shards move when their loads change."""
SPLIT_KEEP = 0.7
"""What is left of the old estimate of what a split costs after a window."""
FORESIGHT = 100.0
"""Observations that what the twin foresees is worth to the next draw, times its trust squared: all others together are
worth up to a hundred, and a twin that errs is to count for little."""
TEMPER = 0.5
"""Share of what is believed that outlives a drift of rewards or of the twin's error."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How the loop works; each part's own settings within."""

    cell_replicas: int = 2
    twin: bool = True
    """Whether windows are replayed in the twin under every arm."""
    replayed_requests: int = 200_000
    """Most requests that the twin simulates per window: about a second of CPU."""
    regimes: bool = True
    """Whether kinds of traffic are remembered."""
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
        self.foresight = Foresight()
        self.drift = DriftMonitor()
        self.split_cost = 0.0
        """Utility that a cell of its own for a challenger costs, by the twin."""
        self.rails = GuardRails()
        self.proposed: tuple[Allocation, str] | None = None
        """What would serve the next window, were it not a dry run, and why."""
        self.latest: Observation | None = None
        """What is known of the window that has ended last."""
        self._charges: dict[str, float] = {}
        self._load = np.zeros(SHARDS)
        self._windows: dict[int, Remembered] = {}
        self._events: list[EventRow] = []
        self._now = (0, 0.0)
        """The window that has ended last, and when."""
        self._grounds = Grounds("", None, None, {}, {})
        if state:
            self._restore(state)
        self.beliefs.regimes.remembers = self.settings.regimes
        self._promotion = Promotion(registry, self.lifecycle, self._say)
        self._heed_twin()
        self._replays = Replays(
            registry, objective, seed, self.settings.replayed_requests, self.settings.twin
        )
        self._draw = Draw(registry, self.beliefs, self.lifecycle, seed, self.settings.cell_replicas)
        self._meet_arms()

    # --- what came of it ----------------------------------------------------------------------

    def settle(self, seen: Observation) -> Settled | None:
        """Take in that a window has ended; return the one before it, settled, if there is one."""
        self._meet_arms()
        self._now = (seen.window, seen.ended_s)
        now = self._windows.get(seen.window)
        if now is not None:
            rows = self._end(now, seen)
            self._foresee(now, seen, rows)
            self._try_in_shadow(now, seen)
        window = seen.window - 1
        ended = window in self._windows and self._windows[window].ended_s > 0.0
        settled = self._settle(window, seen) if ended else None
        self._windows = {w: kept for w, kept in self._windows.items() if w >= window}
        return settled

    def _end(self, now: Remembered, seen: Observation) -> list[CellRow]:
        """Note what can be said of a window at once, its context and its load; return its cells."""
        now.started_s, now.ended_s = seen.started_s, seen.ended_s
        latest = judge(seen.outcome, self.objective, seen.started_s, seen.ended_s, seen.ended_s)
        self.latest = seen
        now.context = describe(latest, seen.replicas)
        self.beliefs.enter(now.context)
        regimes = self.beliefs.regimes
        if regimes.returned:
            best = regimes.champion([a.id for a in self.registry.serving()])
            who = f"; {self._promotion.name(best)} did best in it" if best else ""
            self._say("regime", str(regimes.present), f"a kind of traffic known from before{who}")
        self._load = LOAD_KEEP * self._load + shard_load(latest)
        return cell_rows(latest, now.allocation)

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
        word = self._replays.word(kept, seen, played, self.beliefs.means())
        values = utilities_of(word)
        estimates = self.correction.learn(values, played) if values else {}
        trust, weight = (self.correction.trust, self.correction.weight) if estimates else (0.0, 0.0)
        self._heed_twin()
        charges, self._charges = self._charges, {}
        lean = lean_of(kept.worth, values)
        lean |= {a: lean.get(a, 0.0) - cost for a, cost in charges.items()}
        residual = self.beliefs.learn(
            rows, kept.vector, kept.context, estimates, lean, trust, weight
        )
        regret = regret_of(estimates, shares, word, self.correction) if estimates else None
        errors = twin_errors(window, judged, word, shares)
        drifted = self._watch(residual, errors)
        self.lifecycle.remember(estimates)
        utility = utility_by_arm(rows)
        self._promotion.review(utility, estimates, self.beliefs.means(kept.vector), drifted)
        expected = {arm: said + self.correction.lasting for arm, said in values.items()}
        self._promotion.compare(window, utility, expected, lean)
        self._promotion.unmask({arm: self.correction.own(arm) for arm in played})
        best = max(estimates.values()) if estimates else judged.mean_utility()
        trigger = self._trigger(window, regret.low if regret else None, best, drifted)
        interval = (regret.value, regret.low, regret.high) if regret else None
        context = kept.context | {"split_cost": self.split_cost}
        estimated = self._estimate_rows(values, played, estimates, seen.replicas)
        events, self._events = self._events, []
        return Settled(
            window=window_row(judged, window, self.objective, context, interval, drifted, weight),
            cells=tuple(rows),
            estimates=tuple(estimated),
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

    def _foresee(self, now: Remembered, seen: Observation, rows: Sequence[CellRow]) -> None:
        """Let the twin say at once what the window that has just ended means for each arm, and for a split.

        Great harm and great gain in its cells, the `rows`, have their consequences at once, too.
        """
        word = self._replays.word(now, seen, now.allocation.arms(), self.beliefs.means())
        said = utilities_of(word)
        worth = now.worth = self._replays.worth(now, seen, word) if said else {}
        self._promotion.move(self.lifecycle.guard(self.registry.serving(), rows, worth, said))
        self._promotion.move(self.lifecycle.excelling(self.registry.serving(), rows, worth))
        if said:  # what was foreseen stands until there are requests again
            self._expect(said, worth)
        self.beliefs.foresight_weight = FORESIGHT * self.correction.trust**2
        cost = self._replays.split_cost(now, seen, now.allocation, word)
        if cost is not None:
            self.split_cost += (1.0 - SPLIT_KEEP) * (max(cost, 0.0) - self.split_cost)

    def _expect(self, said: Mapping[str, float], worth: Mapping[str, float]) -> None:
        """Foresee what the next window brings each arm, by what is `said` of the newest and what it is `worth`."""
        surely = self.correction.surely
        foreseen, newest = self.foresight.take_in(word_of(said, worth)), advantages(worth)
        self.beliefs.foresight = {a: u + surely(a) for a, u in foreseen.items()}
        self.beliefs.newest_word = {a: u + surely(a) for a, u in newest.items()}
        self.beliefs.foreseen_level = float(np.mean([u + surely(a) for a, u in said.items()]))

    def _try_in_shadow(self, now: Remembered, seen: Observation) -> None:
        """Let the arms in shadow decide the window that has just ended, beside the arm that served most."""
        arms = self._replays.shadows()
        if arms:
            live = max(now.allocation.arms(), key=now.allocation.share)
            judged, worth = self._replays.in_shadow(now, seen, arms)
            beside = (live, self._promotion.name(live))
            self._promotion.move(self.shadow.review(arms, judged, worth, beside, seen.replicas))

    def _watch(self, residual: float | None, errors: Sequence[TwinErrorRow]) -> tuple[str, ...]:
        """Look for drift; forget faster where what is believed has become wrong."""
        streams = {"context": float(np.sqrt(np.mean(self.beliefs.vector[1:] ** 2)))}
        if residual is not None:
            streams["reward"] = residual
        for error in errors:
            if error.metric == "utility":
                streams["twin"] = error.observed - error.twin
        drifted = self.drift.observe(streams)
        for name in drifted:
            self._say("drift", name, f"the mean of {name} has changed")
        if {"reward", "twin"} & set(drifted):
            self.beliefs.temper(TEMPER)
        return drifted

    def _trigger(
        self, window: int, regret_low: float | None, best: float | None, drifted: Sequence[str]
    ) -> Trigger | None:
        trigger = self.triggers.consider(window, self._now[1], regret_low, best, drifted)
        if trigger is not None and self.rails.hold:
            order = in_force(self.rails, self._promotion.name)
            self._say("synthesis", trigger.kind, f"not asked ({order}): {trigger.why}")
            return None
        if trigger is not None:
            self._say("synthesis", trigger.kind, trigger.why)
        return trigger

    # --- arms ---------------------------------------------------------------------------------

    def welcome(self, arm_id: str, like: str | None, gain: float, pseudo_count: float) -> None:
        """Believe what the race said of a new arm: `gain` in utility over the arm `like`."""
        self._meet_arms()
        known = like if like in self.beliefs.arms else None
        self.beliefs.bandit.warm_start(arm_id, known, gain, pseudo_count)

    def follow_clock(self, by_s: float) -> None:
        """Move all times that are remembered: the clock was set by so much."""
        for window in self._windows.values():
            window.follow_clock(by_s)
        self.triggers.follow_clock(by_s)

    def charge(self, arm_id: str, utility: float) -> None:
        """Charge an arm for what its plan cost beside what its requests felt; the next window settles it."""
        self._charges[arm_id] = self._charges.get(arm_id, 0.0) + utility

    def _heed_twin(self) -> None:
        self.lifecycle.twin_is_proven = self.settings.twin and self.correction.is_proven

    def control(self) -> Arm:
        """Return the arm that is the baseline: the human one believed to be best."""
        return self._promotion.control(self.beliefs.means())

    def _meet_arms(self) -> None:
        """Know the arms that serve or may serve again, and no others."""
        kept = SERVING | {State.SHADOW, State.QUARANTINED}
        self.beliefs.meet([a.id for a in self.registry.fast() if a.state in kept])

    def _say(self, kind: str, subject: str, message: str) -> None:
        window, at_s = self._now
        self._events.append(EventRow(at_s, kind, window, subject, message))

    # --- who serves next ----------------------------------------------------------------------

    def constrain(self, rails: GuardRails) -> None:
        """Decide from now on within what an operator has ordered."""
        self.rails = rails
        self._promotion.constrain(rails)

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
            allocation, self._grounds = self._drawn(window, replicas)
        else:
            if self.rails.dry_run:
                drawn, grounds = self._drawn(window, replicas)
                told = explain(drawn, self._last_allocation(), grounds, self._promotion.name)
                self.proposed = drawn, told
            allocation = keep(held, window, members_of(replicas), serving, self.control().id)
            self._grounds = self._draw.grounds(window, self.rails, {})
        last = self._windows.get(window - 1)
        earlier = last.followed() if last else ()
        self._windows[window] = Remembered(allocation, self.beliefs.vector, earlier=earlier)
        return allocation

    def _drawn(self, window: int, replicas: Sequence[ReplicaSpec]) -> tuple[Allocation, Grounds]:
        if self.settings.twin and self.beliefs.context is None and not self.beliefs.foresight:
            programs = {a.id: self.registry.program(a.id) for a in self.registry.serving()}
            self.beliefs.foresight = reputation(programs, replicas, self.objective, self.seed)
            self.beliefs.foresight_weight = REPUTATION_WEIGHT
        return self._draw.allocation(self._situation(window, replicas))

    def _situation(self, window: int, replicas: Sequence[ReplicaSpec]) -> Situation:
        return Situation(
            window=window,
            replicas=tuple(replicas),
            last=self._last_allocation(),
            load=self._load,
            trust=self.correction.trust if self.settings.twin else 0.0,
            split_cost=self.split_cost,
            rails=self.rails,
        )

    def _last_allocation(self) -> Allocation | None:
        last = self._windows.get(max(self._windows, default=-1))
        return last.allocation if last else None

    def why(self, allocation: Allocation, previous: Allocation | None) -> str:
        """Say in one line what the allocation drawn last does, and why."""
        return explain(allocation, previous, self._grounds, self._promotion.name)

    def _estimate_rows(
        self,
        twin: Mapping[str, float],
        played: Mapping[str, Played],
        estimates: Mapping[str, float],
        replicas: Sequence[ReplicaSpec],
    ) -> list[ArmEstimate]:
        p: dict[str, float] = {}
        if eligible(self.registry.serving(), self.rails) and replicas:
            now = self._situation(max(self._windows, default=-1) + 1, replicas)
            p = self._draw.probabilities(now)
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
            "split_cost": self.split_cost,
            "charges": self._charges,
            "correction": self.correction.to_dict(),
            "foresight": self.foresight.to_dict(),
            "lifecycle": self.lifecycle.to_dict(),
            "shadow": self.shadow.to_dict(),
            "triggers": self.triggers.to_dict(),
            "windows": [kept.to_plain() for kept in self._windows.values()],
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
        self.foresight.restore(plain.get("foresight", {}))
        self.lifecycle.restore(plain["lifecycle"])
        self.shadow.restore(plain.get("shadow", {}))
        self.triggers.restore(plain["triggers"])
        self.split_cost = plain.get("split_cost", 0.0)
        self._charges = plain.get("charges", {})
        self._load = np.array(plain["load"], np.float64)
        kept = [Remembered.from_plain(w) for w in plain["windows"]]
        self._windows = {k.allocation.window: k for k in kept}
