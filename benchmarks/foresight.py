"""How well it is foreseen which arm the next windows want.

    python benchmarks/foresight.py [--scenario WORD] [--seeds N] [--ahead WINDOWS]

The learning system serves the situations of `bench dynamics --quick`. At the end of each judged window the twin goes on
from the state of that moment under every arm that serves, with the traffic that really came. Printed is how much less
utility than the best of them the arm earns that is preferred by each way of telling: by the window just ended, by the
long run, by both, by their average over windows (what the loop uses), and by staying with whoever serves.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.registry import Registry
from autopoiesis.evaluation import contestants
from autopoiesis.evaluation.bench import traces_folder
from autopoiesis.evaluation.scenario import Situation, situation_of
from autopoiesis.evaluation.suites import dynamics
from autopoiesis.orchestrator import replay
from autopoiesis.orchestrator.loop import WindowLoop
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.rehearsal import Rehearsal
from autopoiesis.orchestrator.replay import OnlineRun
from autopoiesis.orchestrator.replays import word_of
from autopoiesis.orchestrator.rerun import stages

HUMAN = "(the best human arm, fixed)"


@dataclass(frozen=True)
class Moment:
    """The end of a window, and what was foreseen then, by way of telling and arm."""

    at_s: float
    window_s: float
    replicas: tuple[Any, ...]
    earlier: tuple[tuple[float, Allocation], ...]
    arms: tuple[str, ...]
    told: dict[str, dict[str, float]]


class Listening(WindowLoop):
    """A loop that notes what it foresees."""

    heard: list[Moment]

    def _foresee(self, now: Any, seen: Observation, rows: Any) -> None:
        self._said: dict[str, dict[str, float]] = {}
        super()._foresee(now, seen, rows)
        if not self._said:
            return
        serving = tuple(arm.id for arm in self.registry.serving())
        most = max(now.allocation.arms(), key=now.allocation.share)
        told = {**self._said, "(whoever serves)": {most: 1.0}}
        length_s = seen.ended_s - seen.started_s
        self.heard.append(
            Moment(seen.ended_s, length_s, seen.replicas, now.followed(), serving, told)
        )

    def _expect(self, said: dict[str, float], worth: dict[str, float]) -> None:
        super()._expect(said, worth)
        self._said = {
            "the newest window": said,
            "the long run": worth,
            "both": word_of(said, worth),
            "both, averaged": self.beliefs.foresight,
        }


def served(situation: Situation) -> tuple[Registry, OnlineRun, list[Moment]]:
    """Let the learning system serve; return what it noted."""
    kept: list[tuple[Registry, OnlineRun]] = []
    Listening.heard = []

    def keeping(trace: Any, fleet: Any, registry: Registry, *rest: Any, **named: Any) -> OnlineRun:
        run = replay.run_online(trace, fleet, registry, *rest, **named)
        kept.append((registry, run))
        return run

    with (
        patch.object(replay, "WindowLoop", Listening),
        patch.object(contestants, "run_online", keeping),
    ):
        contestants.contestants()[contestants.OURS](situation, dynamics(True).effort)
    return *kept[0], Listening.heard


def earned(
    situation: Situation, registry: Registry, run: OnlineRun, moment: Moment, ahead: int
) -> tuple[dict[str, float], int]:
    """Return what each arm would have earned in the windows after a moment, and their requests."""
    until_s = moment.at_s + ahead * moment.window_s
    rows = np.flatnonzero(situation.trace.arrival_s < until_s + moment.window_s)
    seen = Observation(
        0,
        moment.at_s,
        until_s + moment.window_s,
        situation.trace.select(rows),
        run.served.outcome.select(rows),
        moment.replicas,
    )
    before = stages(moment.earlier, registry, moment.replicas)
    rehearsal = Rehearsal(seen, moment.at_s, until_s, situation.objective, situation.seed, before)
    judged = rehearsal.under({arm: registry.program(arm) for arm in moment.arms})
    utility = {arm: j.mean_utility() or 0.0 for arm, j in judged.items()}
    requests = max((int(j.counts.sum()) for j in judged.values()), default=0)
    return utility, requests


def losses(situation: Situation, ahead: int) -> tuple[dict[str, float], int]:
    """Return the utility lost against the best arm of each moment, summed over requests, by way of telling."""
    registry, run, moments = served(situation)
    lost: dict[str, float] = defaultdict(float)
    fixed: dict[str, float] = defaultdict(float)
    total = 0
    for moment in moments:
        if (
            not situation.judged_from_s
            <= moment.at_s
            <= situation.trace.duration_s - moment.window_s
        ):
            continue
        utility, requests = earned(situation, registry, run, moment, ahead)
        best = max(utility.values(), default=0.0)
        for way, told in moment.told.items():
            preferred = max((a for a in told if a in utility), key=told.__getitem__, default="")
            lost[way] += requests * (best - utility.get(preferred, 0.0))
        for arm, u in utility.items():
            fixed[arm] += requests * (best - u)
        total += requests
    human = [a.id for a in registry.all() if a.origin == "human" and a.id in fixed]
    lost[HUMAN] = min((fixed[a] for a in human), default=0.0)
    return dict(lost), total


def show(name: str, sums: Sequence[tuple[dict[str, float], int]]) -> None:
    """Print the mean loss per request of each way of telling, the best first."""
    requests = sum(n for _, n in sums)
    ways = {way: sum(lost[way] for lost, _ in sums) / requests for way in sums[0][0]}
    print(name)
    for way, loss in sorted(ways.items(), key=lambda each: each[1]):
        print(f"  {loss:.3f}  {way}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="", help="only scenarios whose name holds this word")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ahead", type=int, default=2, help="windows that count")
    asked = parser.parse_args()
    for scenario in dynamics(True).scenarios:
        if asked.scenario in scenario.name:
            situations = [
                situation_of(scenario, seed, traces_folder()) for seed in range(asked.seeds)
            ]
            show(scenario.name, [losses(each, asked.ahead) for each in situations])


if __name__ == "__main__":
    main()
