"""One unit of work: one contestant in one scenario with one seed."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from autopoiesis.evaluation.cluster import CLUSTERS, Costs, batches
from autopoiesis.evaluation.contestants import ablations, contestants
from autopoiesis.evaluation.effort import Effort
from autopoiesis.evaluation.live import live
from autopoiesis.evaluation.measures import measured
from autopoiesis.evaluation.parts import Part
from autopoiesis.evaluation.scenario import Scenario, Situation, situation_of
from autopoiesis.evaluation.slow_contestants import SlowEffort
from autopoiesis.evaluation.slow_contestants import contestants as slow_contestants
from autopoiesis.evaluation.workload import Workload, parts_of


class Unit(Protocol):
    """Something to run in a process of its own."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def heavy(self) -> float:
        """About how long it takes, in any unit; the longest go first."""
        ...

    def depends_on(self) -> Mapping[str, Any]:
        """Return what its result depends on besides the code, as plain data."""
        ...

    def run(self) -> Part:
        """Do the work."""
        ...


@dataclass(frozen=True, slots=True)
class RequestUnit:
    """A contestant that decides request by request."""

    suite: str
    scenario: Scenario
    contestant: str
    seed: int
    effort: Effort
    traces: str
    """Folder of the traces."""
    live: bool = False
    """Whether real processes serve, in real time."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.scenario.name} · {self.contestant} · seed {self.seed}"

    @property
    def heavy(self) -> float:
        """About how long it takes."""
        kind, _, _ = self.contestant.partition("/")
        return {"human": 1.0, "oracle": 5.0, "tuned": 20.0}.get(kind, 50.0)

    def depends_on(self) -> Mapping[str, Any]:
        """Return what its result depends on besides the code."""
        return {
            "scenario": asdict(self.scenario),
            "contestant": self.contestant,
            "seed": self.seed,
            "effort": asdict(self.effort) if self.heavy > 5.0 else None,
            "live": self.live,
        }

    def run(self) -> Part:
        """Serve the situation and measure what came of it."""
        began_s = time.monotonic()
        situation = _situation(self.scenario, self.seed, self.traces)
        if self.live:
            ran = live(self.contestant, situation)
        else:
            ran = {**contestants(), **ablations()}[self.contestant](situation, self.effort)
        row, windows = measured(situation, ran)
        return Part(
            suite=self.suite,
            scenario=self.scenario.name,
            contestant=self.contestant,
            seed=self.seed,
            row=row,
            windows=windows.as_lists(),
            shifts_s=[at - situation.judged_from_s for at in situation.shifts_s],
            window_s=situation.window_s,
            decisions={str(w): names for w, names in ran.decisions.items()},
            said=ran.said,
            seconds=time.monotonic() - began_s,
        )


@lru_cache(maxsize=4)
def _situation(scenario: Scenario, seed: int, traces: str) -> Situation:
    """Make a scenario concrete once for the contestants that this process runs one after the other."""
    return situation_of(scenario, seed, Path(traces))


@dataclass(frozen=True, slots=True)
class PlanScenario:
    """One of the paper's settings: a cluster, a trace of phases, and what changes cost."""

    name: str
    cluster: str
    trace: str
    past: str
    """The cluster's other trace, which may be learned from."""
    costs: str

    def workload(self, trace: str, seed: int) -> Workload:
        """Return the phases of a trace as the seed has them."""
        cluster = CLUSTERS[self.cluster]
        return Workload(cluster, batches(trace, cluster, seed), Costs(self.costs))


@dataclass(frozen=True, slots=True)
class PlanUnit:
    """A contestant that decides on plans."""

    suite: str
    scenario: PlanScenario
    contestant: str
    seed: int
    effort: SlowEffort

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.scenario.name} · {self.contestant} · seed {self.seed}"

    @property
    def heavy(self) -> float:
        """About how long it takes."""
        return 1.0 if self.contestant.startswith("human/") else 20.0

    def depends_on(self) -> Mapping[str, Any]:
        """Return what its result depends on besides the code."""
        return {
            "plan": asdict(self.scenario),
            "contestant": self.contestant,
            "seed": self.seed,
            "effort": asdict(self.effort) if self.heavy > 1.0 else None,
        }

    def run(self) -> Part:
        """Serve the workload and measure what it took."""
        began_s = time.monotonic()
        work = self.scenario.workload(self.scenario.trace, self.seed)
        past = self.scenario.workload(self.scenario.past, PAST_SEEDS + self.seed)
        planned = slow_contestants()[self.contestant](work, past, self.effort, self.seed)
        state, spent = planned.state, planned.spent
        row = {
            **parts_of(state),
            "reschedulings": state.reschedulings,
            "faults": state.faults,
            "requests": sum(sum(batch.requests) for batch in work.batches),
            "gpu_seconds": state.gpu_seconds,
            "promoted": planned.promoted,
            "harmful": planned.harmful,
            "live": planned.promoted,
            "harmful_live": planned.harmful,
            "evolution_cpu_s": spent.cpu_s,
            "evolution_replays": spent.replays,
            "evolution_cycles": spent.cycles,
            "evolution_tokens": spent.tokens,
            "evolution_usd": spent.cost_usd,
        }
        phases = {"lasted_s": list(state.lasted_s)}
        return Part(
            suite=self.suite,
            scenario=self.scenario.name,
            contestant=self.contestant,
            seed=self.seed,
            row=row,
            windows=phases,
            shifts_s=[],
            window_s=0.0,
            decisions={},
            said=planned.said,
            seconds=time.monotonic() - began_s,
        )


PAST_SEEDS = 1000
"""Added to a seed: the past has other fluctuation than what is judged."""
