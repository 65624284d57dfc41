"""From parts to conclusions: paired over seeds, with bootstrap intervals.

A gain is the relative reduction of a cost: of requests outside their objectives, or of total time.
The rival is chosen in hindsight for each scenario and seed, so it is harder to beat than any fixed one.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from autopoiesis.evaluation.contestants import BOUND, FROZEN, ORACLE, OURS, SWITCHING
from autopoiesis.evaluation.measures import Windows, adaptation_s
from autopoiesis.evaluation.parts import Part

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
BEST_HUMAN = "best human arm per trace"
ROOM = 0.01
"""Share of misses under the best human arm from which on a scenario has something to gain."""
HUMAN, TUNED = "human/", "tuned/"
PAPER_BASELINES = tuple(
    f"{HUMAN}{name}"
    for name in ("greedy", "never", "full-migration", "minimal-migration", "amortised")
)
"""What the paper compares itself with, and HexGen-3's trigger; `never` is its ILP, solved once."""


class Rival(NamedTuple):
    """Who is compared with."""

    names: tuple[str, ...]
    each: bool = False
    """Whether the gain is the mean of those over each of them, not that over the best in hindsight."""


class Gain(NamedTuple):
    """A relative reduction with its interval; NaN where there was nothing to reduce."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """All parts of a suite, by scenario, contestant and seed."""

    suite: str
    cost: str
    """The column that gains are reductions of."""
    parts: tuple[Part, ...]

    @property
    def scenarios(self) -> list[str]:
        """Names of the scenarios, in the order in which they were run."""
        return list(dict.fromkeys(part.scenario for part in self.parts))

    @property
    def seeds(self) -> list[int]:
        """Seeds that were run."""
        return sorted({part.seed for part in self.parts})

    @property
    def contestants(self) -> list[str]:
        """Names of the contestants, in the order in which they were run."""
        return list(dict.fromkeys(part.contestant for part in self.parts))

    def of(self, scenario: str, contestant: str) -> list[Part]:
        """Return the parts of one contestant in one scenario, by seed."""
        found = [p for p in self.parts if (p.scenario, p.contestant) == (scenario, contestant)]
        return sorted(found, key=lambda part: part.seed)

    def costs(self, scenario: str, contestant: str) -> Floats:
        """Return the contestant's cost per seed."""
        return np.array([float(p.row[self.cost]) for p in self.of(scenario, contestant)])

    def group(self, prefix: str) -> list[str]:
        """Return the contestants whose names begin so."""
        return [name for name in self.contestants if name.startswith(prefix)]

    def best(self, scenario: str, names: Collection[str]) -> list[Part]:
        """Return, per seed, the part of whichever of them did best there."""
        runs = [self.of(scenario, name) for name in names]
        return [
            min(same, key=lambda p: float(p.row[self.cost])) for same in zip(*runs, strict=True)
        ]

    def best_costs(self, scenario: str, names: Collection[str]) -> Floats:
        """Return the lowest cost of any of them, per seed."""
        return np.array([float(p.row[self.cost]) for p in self.best(scenario, names)])


def interval(statistic: Callable[[NDArray[np.int64]], float], seeds: int) -> Gain:
    """Return a statistic of seeds (by index) with its percentile bootstrap interval over them."""
    everyone = np.arange(seeds)
    value = statistic(everyone)
    if seeds < 2 or not np.isfinite(value):
        return Gain(value, float("nan"), float("nan"))

    def of_sample(rows: NDArray[np.int64]) -> float:
        return statistic(rows)

    found = bootstrap(
        (everyone,),
        of_sample,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Gain(value, float(low), float(high))


def reduction(ours: Floats, rival: Floats) -> float:
    """Return by which part of the rival's cost ours is lower; NaN if the rival has none."""
    total = float(rival.sum())
    return 1.0 - float(ours.sum()) / total if total > 0.0 else float("nan")


def gain_over(results: Results, rival: Rival, scenarios: Sequence[str], ours: str) -> Gain:
    """Return the mean gain over scenarios, against the best of the rival in each of them and per seed."""
    groups = [[name] for name in rival.names] if rival.each else [list(rival.names)]
    pairs = [
        (results.costs(s, ours), results.best_costs(s, group))
        for s in scenarios
        for group in groups
    ]
    if not pairs or not rival.names:
        return Gain(float("nan"), float("nan"), float("nan"))

    def mean(rows: NDArray[np.int64]) -> float:
        gains = [reduction(mine[rows], theirs[rows]) for mine, theirs in pairs]
        return float(np.nanmean(gains)) if np.isfinite(gains).any() else float("nan")

    return interval(mean, len(results.seeds))


def with_room(results: Results) -> list[str]:
    """Return the scenarios in which the best human arm leaves something to gain."""
    if results.cost != "misses":
        return results.scenarios
    return [
        s
        for s in results.scenarios
        if np.mean([p.row["miss_share"] for p in results.best(s, results.group(HUMAN))]) >= ROOM
    ]


def summary_of(results: Results, ours: str = OURS) -> dict[str, Any]:
    """Return what `summary.json` holds, without the machine: gains, adaptation, harm and cost."""
    room = with_room(results)
    rivals = rival_groups(results)
    overall = {name: gain_over(results, group, room, ours) for name, group in rivals.items()}
    against = BEST_HUMAN
    gain = overall[against]
    return {
        "suite": results.suite,
        "mean_gain": gain.mean,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "against": against,
        "cost": results.cost,
        "ours": ours,
        "seeds": len(results.seeds),
        "confidence": CONFIDENCE,
        "scenarios_with_room": room,
        "comparisons": [
            {"against": name, "mean_gain": g.mean, "gain_low": g.low, "gain_high": g.high}
            for name, g in overall.items()
        ],
        "scenarios": [_scenario(results, name, rivals, ours) for name in results.scenarios],
        **_adaptation(results, ours),
        **_promotions(results, ours),
    }


def rival_groups(results: Results) -> dict[str, Rival]:
    """Return who is compared with."""
    paper = tuple(name for name in PAPER_BASELINES if name in results.contestants)
    groups = {
        BEST_HUMAN: Rival(tuple(results.group(HUMAN))),
        "best tuned arm per trace": Rival(tuple(results.group(TUNED))),
        "best of the paper's baselines per trace": Rival(paper),
        "each of the paper's baselines": Rival(paper, each=True),
    }
    single = (FROZEN, SWITCHING, ORACLE, BOUND)
    groups |= {name: Rival((name,)) for name in single if name in results.contestants}
    return {name: rival for name, rival in groups.items() if rival.names}


def _scenario(results: Results, name: str, rivals: dict[str, Rival], ours: str) -> dict[str, Any]:
    against = rivals[BEST_HUMAN]
    gain = gain_over(results, against, [name], ours)
    best = results.best(name, against.names)
    mean_cost = {c: float(results.costs(name, c).mean()) for c in results.contestants}
    told: dict[str, Any] = {
        "name": name,
        "gain": gain.mean,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "best_human": [part.contestant.removeprefix(HUMAN) for part in best],
        "cost": mean_cost,
        "gains": {
            rival: dict(
                zip(
                    ("gain", "gain_low", "gain_high"),
                    gain_over(results, group, [name], ours),
                    strict=True,
                )
            )
            for rival, group in rivals.items()
        },
    }
    if results.cost == "misses":
        told["miss_share"] = {
            c: float(np.mean([p.row["miss_share"] for p in results.of(name, c)]))
            for c in results.contestants
        }
        mine = [p.row["miss_share"] for p in results.of(name, ours)]
        told["loss_against_best_human"] = float(
            np.mean(np.subtract(mine, [p.row["miss_share"] for p in best]))
        )
        told["regret"] = regret(results, name, ours)
    return told


def regret(results: Results, scenario: str, contestant: str) -> float | None:
    """Return the mean utility lost against the oracle over human arms; None without an oracle."""
    oracle = results.of(scenario, ORACLE)
    if not oracle:
        return None
    mine = results.of(scenario, contestant)
    lost = [o.row["utility"] - m.row["utility"] for o, m in zip(oracle, mine, strict=True)]
    return float(np.mean(lost))


def adaptations(results: Results, scenario: str, contestant: str) -> list[float | None]:
    """Return the time from each shift until the contestant was as good as the best human arm there."""
    found: list[float | None] = []
    human = [results.of(scenario, name) for name in results.group(HUMAN)]
    for i, part in enumerate(results.of(scenario, contestant)):
        windows = windows_of(part)
        shares = [
            windows_of(runs[i]).met / np.maximum(windows_of(runs[i]).requests, 1.0)
            for runs in human
        ]
        best = np.max(shares, axis=0)
        found += [adaptation_s(windows, best, at, part.window_s) for at in part.shifts_s]
    return found


def windows_of(part: Part) -> Windows:
    """Return the judged windows of a part."""
    return Windows(**{name: np.array(part.windows[name]) for name in Windows._fields})


def _adaptation(results: Results, ours: str) -> dict[str, Any]:
    if results.cost != "misses":
        return {}
    times = [t for s in results.scenarios for t in adaptations(results, s, ours)]
    reached = [t for t in times if t is not None]
    return {
        "shifts": len(times),
        "adapted": len(reached),
        "adaptation_p50_s": float(np.median(reached)) if reached else None,
        "adaptation_p90_s": float(np.percentile(reached, 90)) if reached else None,
    }


def _promotions(results: Results, ours: str) -> dict[str, Any]:
    mine = [part.row for s in results.scenarios for part in results.of(s, ours)]
    counts = {
        what: sum(row[what] for row in mine)
        for what in ("promoted", "harmful", "live", "harmful_live")
    }
    promoted, live = counts["promoted"], counts["live"]
    return {
        **counts,
        "harmful_share": counts["harmful"] / promoted if promoted else None,
        "harmful_live_share": counts["harmful_live"] / live if live else None,
        "evolution_cpu_s_per_run": float(np.mean([row["evolution_cpu_s"] for row in mine])),
        "evolution_replays_per_run": float(np.mean([row["evolution_replays"] for row in mine])),
        "evolution_tokens": sum(row["evolution_tokens"] for row in mine),
        "evolution_usd": sum(row["evolution_usd"] for row in mine),
    }
