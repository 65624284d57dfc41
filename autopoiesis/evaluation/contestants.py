"""Who serves: functions from a situation to what became of its requests. None sees what is to come."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autopoiesis.arms.arm import Arm, State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.evaluation.effort import Effort, Spent
from autopoiesis.evaluation.evolution import Evolution, brief_on, tuned_arm
from autopoiesis.evaluation.scenario import Situation
from autopoiesis.orchestrator.loop import LoopSettings
from autopoiesis.orchestrator.replay import oracle, run_online
from autopoiesis.orchestrator.replay_fleet import Served
from autopoiesis.orchestrator.reward import utilities
from autopoiesis.orchestrator.triggers import TriggerSettings

HARMFUL = 0.01
"""Loss of mean utility against the arm that a policy was to beat, from which on its promotion is harmful."""

EVOLVE_BELOW = 0.99
"""Utility below which the learning system asks for new policies (`target_utility`; the default is 0.95):
a mean of 0.99 still holds several misses in a hundred requests."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a contestant made of a situation."""

    served: Served
    spent: Spent = field(default_factory=Spent)
    promoted: int = 0
    """Policies that were made while serving and got past the gates."""
    harmful: int = 0
    """Those of them that would have served what came after worse than the arm they were to beat."""
    live: int = 0
    """Those of the promoted that got past the canary, too."""
    harmful_live: int = 0
    """Those of the harmful that did."""
    decisions: Mapping[int, str] = field(default_factory=dict[int, str])
    """Window → names of the arms that served it."""
    said: str = ""
    """What is worth telling: the policy that was made."""


Contestant = Callable[[Situation, Effort], Ran]


class _Pool:
    """Arms in memory, all of them live at first; it remembers who has ever been."""

    def __init__(self, arms: tuple[Arm, ...]) -> None:
        self._arms = {arm.id: replace(arm, state=State.LIVE) for arm in arms}
        self.been_live = set(self._arms)

    def load_arms(self) -> list[Arm]:
        return list(self._arms.values())

    def save_arm(self, arm: Arm) -> None:
        self._arms[arm.id] = arm
        if arm.state is State.LIVE:
            self.been_live.add(arm.id)


def human(name: str) -> Contestant:
    """Return a human arm alone."""
    return lambda situation, _effort: Ran(_alone(situation, _arm(name).source))


def tuned(name: str) -> Contestant:
    """Return a human arm whose numbers were tuned on the past."""

    def serve(situation: Situation, effort: Effort) -> Ran:
        spent = Spent()
        replicas = situation.fleet.replicas
        source = tuned_arm(situation, _arm(name), replicas, effort.past_replays, spent)
        return Ran(_alone(situation, source), spent, said=source)

    return serve


def frozen(situation: Situation, effort: Effort) -> Ran:
    """Evolve once on the past; then the best of that serves alone, or the best human arm of the past."""
    evolution = Evolution(situation, effort)
    replicas, arms = situation.fleet.replicas, seed_arms()
    source = best_of_the_past(situation).source
    brief = brief_on(situation, situation.past, replicas, arms, effort.past_replays)
    if brief is not None:
        row = evolution.cycle(brief)
        source = next((c.source for c in row.candidates if c.verdict == "promoted"), source)
    return Ran(_alone(situation, source), evolution.spent, said=source)


def best_of_the_past(situation: Situation) -> Arm:
    """Return the human arm that would have served the past best."""

    def utility(arm: Arm) -> float:
        program = compile_policy(verify(arm.source))
        served = situation.fleet.alone(situation.past, program, situation.objective, situation.seed)
        return float(utilities(served.outcome, situation.objective, np.inf)[0].mean())

    return max(seed_arms(), key=utility)


@dataclass(frozen=True, slots=True)
class Online:
    """The learning system, with what may be left out of it."""

    evolves: bool = True
    twin: bool = True
    cells: bool = True
    archive: bool = True
    gates: bool = True
    regimes: bool = True
    tuning: bool = True

    def __call__(self, situation: Situation, effort: Effort) -> Ran:
        """Serve the past and what is judged, learning all the way."""
        with tempfile.TemporaryDirectory(prefix="autopoiesis-bench-") as folder:
            archive = Path(folder) / "archive.json" if self.archive else None
            evolution = Evolution(situation, effort, archive, self.gates, self.tuning)
            return self._serve(situation, evolution)

    def _serve(self, situation: Situation, evolution: Evolution) -> Ran:
        pool = _Pool(seed_arms())
        registry = Registry(pool)
        settings = LoopSettings(
            cell_replicas=2 if self.cells else len(situation.fleet.replicas),
            twin=self.twin,
            regimes=self.regimes,
            triggers=TriggerSettings(target=EVOLVE_BELOW, cooldown_s=evolution.effort.cooldown_s),
        )
        run = run_online(
            situation.trace,
            situation.fleet,
            registry,
            situation.objective,
            situation.seed,
            situation.window_s,
            evolution if self.evolves else None,
            settings,
            cycle_s=evolution.effort.cycle_s,
        )
        made = {made.arm.id: made for made in evolution.made}
        sources = {arm.id: arm.source for arm in registry.all()}
        harmful = {
            arm
            for arm, each in made.items()
            if each.beaten in sources
            and is_harmful(situation, each.arm.source, sources[each.beaten], each.at_s)
        }
        return Ran(
            run.served,
            evolution.spent,
            promoted=len(made),
            harmful=len(harmful),
            live=len(pool.been_live & made.keys()),
            harmful_live=len(pool.been_live & harmful),
            decisions={
                s.window.window: "+".join(
                    dict.fromkeys(registry.get(cell.arm_id).name for cell in s.cells)
                )
                for s in run.settled
            },
            said="\n".join(each.arm.source for each in list(made.values())[-2:]),
        )


def is_harmful(situation: Situation, source: str, beaten: str, at_s: float) -> bool:
    """Tell whether a policy alone would have served what came from `at_s` on worse than the one it beat.

    It is the measure's hindsight; no contestant knows it.
    """
    later = situation.trace.arrival_s >= at_s
    if not later.any():
        return False

    def utility(policy: str) -> float:
        served = _alone(situation, policy)
        return float(utilities(served.outcome, situation.objective, np.inf)[0][later].mean())

    return utility(source) < utility(beaten) - HARMFUL


def hindsight(situation: Situation, _effort: Effort) -> Ran:
    """Compose the oracle: each window from the human arm that served it best. It knows the future."""
    alone = {arm.id: _alone(situation, arm.source) for arm in seed_arms()}
    best = oracle(
        {arm: served.outcome for arm, served in alone.items()},
        situation.objective,
        situation.window_s,
    )
    spent_s = float(np.mean([served.replica_seconds for served in alone.values()]))
    return Ran(Served(best, spent_s))


def _alone(situation: Situation, source: str) -> Served:
    program = compile_policy(verify(source))
    return situation.fleet.alone(situation.trace, program, situation.objective, situation.seed)


def _arm(name: str) -> Arm:
    return next(arm for arm in seed_arms() if arm.name == name)


OURS = "evolved continuously"
SWITCHING = "switching"
FROZEN = "evolved once"
ORACLE = "oracle"
BOUND = "lower bound"
"""What no contestant can be below; of total times alone."""


def contestants() -> dict[str, Contestant]:
    """Return the contestants by name; human arms are `human/NAME` and `tuned/NAME`."""
    names = [arm.name for arm in seed_arms()]
    return {
        **{f"human/{name}": human(name) for name in names},
        **{f"tuned/{name}": tuned(name) for name in names},
        FROZEN: frozen,
        SWITCHING: Online(evolves=False),
        OURS: Online(),
        ORACLE: hindsight,
    }


def ablations() -> dict[str, Contestant]:
    """Return the learning system with one mechanism left out, by what is left out."""
    return {
        "without twin": Online(twin=False),
        "without cells": Online(cells=False),
        "without archive": Online(archive=False),
        "without gates": Online(gates=False),
        "without regimes": Online(regimes=False),
        "without tuning": Online(tuning=False),
    }
