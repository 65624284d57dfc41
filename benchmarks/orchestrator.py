"""How much the window loop loses while it learns, against the hindsight oracle and other learners.

    python benchmarks/orchestrator.py [--seeds 10] [--for 300] [--only NAME] [--plots DIR] [--json FILE]

Every scenario is one trace, or several spliced so that the regime changes on the way. All systems serve
the same requests in the twin with the same human arms, and a seed begins elsewhere in the traces.
`regret` is the utility lost against the oracle, which takes each window from the arm that served it
best. Vowpal Wabbit takes part where `pip install vowpalwabbit` has put it.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from mabwiser.mab import MAB, LearningPolicy
from scipy.stats import t

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import Arm
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.bandit import LinearThompson
from autopoiesis.orchestrator.context import FEATURES, NAMES, Scaler, describe
from autopoiesis.orchestrator.loop import LoopSettings
from autopoiesis.orchestrator.replay import observe, oracle, run_online
from autopoiesis.orchestrator.replay_fleet import fleet_under
from autopoiesis.orchestrator.rerun import sim_cells
from autopoiesis.orchestrator.reward import judge, utilities
from autopoiesis.twin.composition import splice
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.simulation import ReplicaSpec, Simulation, run_arm
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parent.parent / "traces"
PROFILE = "a100-llama-3-8b-tp1-bf16"
LEARNERS = ("uniform", "mabwiser", "vowpal wabbit", "loop, no twin")
EQUAL = 0.01
"""Arms within this of the best one in a regime are as good as it."""
MOST = 0.8
"""Share of the shards from which on an arm has most of them."""
STRETCH = 30
"""Windows over which the loop is held against the best human arm."""


@dataclass(frozen=True)
class Scenario:
    """Traces with the speed of each, the fleet, the objective and the length of a window."""

    name: str
    parts: tuple[tuple[str, float], ...]
    replicas: int
    objective: Objective
    window_s: float


CHAT, CODE = ("mooncake_conversation_a", 0.7), ("azure2023_code_a", 8.0)
SCENARIOS = (
    Scenario("conv", (("azure2023_conv_a", 6.0),), 4, Objective(), 5.0),
    Scenario("code, overload", (("azure2023_code_a", 8.0),), 4, Objective(), 10.0),
    Scenario("mooncake", (("mooncake_conversation_a", 1.0),), 8, Objective(2.0, 0.05), 20.0),
    Scenario(
        "conv to mooncake",
        (("azure2023_conv_a", 8.0), ("mooncake_conversation_a", 0.7)),
        8,
        Objective(),
        10.0,
    ),
    Scenario(
        "mooncake to code",
        (("mooncake_conversation_a", 0.7), ("azure2023_code_a", 8.0)),
        8,
        Objective(),
        10.0,
    ),
    Scenario("there and back", (CHAT, CODE, CHAT, CODE), 8, Objective(), 10.0),
)


class Arms:
    """The human arms, in memory."""

    def __init__(self) -> None:
        self._arms = {arm.id: arm for arm in seed_arms()}

    def load_arms(self) -> list[Arm]:  # noqa: D102
        return list(self._arms.values())

    def save_arm(self, arm: Arm) -> None:  # noqa: D102
        self._arms[arm.id] = arm


Choose = Callable[[np.ndarray], str]
Learn = Callable[[str, np.ndarray, float], None]


def switch(
    trace: Trace, fleet: tuple[ReplicaSpec, ...], scenario: Scenario, choose: Choose, learn: Learn
) -> Outcome:
    """Give the whole fleet to one arm per window, as libraries for single decisions would."""
    registry, scaler = Registry(Arms()), Scaler()
    simulation = Simulation(trace, fleet, scenario.objective, 0)
    decided: list[tuple[str, np.ndarray]] = []
    everything = (tuple(r.name for r in fleet), tuple(range(SHARDS)))
    vector = scaler.standardise(None)
    for window in range(int(trace.duration_s // scenario.window_s) + 1):
        arm = choose(vector)
        decided.append((arm, vector))
        cells = sim_cells(Allocation(window, (Cell(arm, *everything),)), registry, fleet)
        simulation.allocate(cells)
        ended_s = (window + 1) * scenario.window_s
        simulation.advance(ended_s)
        seen = observe(simulation, window, scenario.window_s, fleet)
        latest = judge(seen.outcome, scenario.objective, seen.started_s, ended_s, ended_s)
        context = describe(latest, fleet)
        scaler.update(context)
        vector = scaler.standardise(context)
        before_s = seen.started_s - scenario.window_s
        settled = judge(seen.outcome, scenario.objective, before_s, seen.started_s, ended_s)
        utility = settled.mean_utility()
        if window and utility is not None:
            learn(*decided[window - 1], utility)
    simulation.advance(np.inf)
    return simulation.outcome()


def uniform(seed: int) -> tuple[Choose, Learn]:
    rng, arms = np.random.default_rng(seed), [a.id for a in seed_arms()]
    return lambda _x: str(rng.choice(arms)), lambda *_: None


def mabwiser(seed: int) -> tuple[Choose, Learn]:
    mab = MAB(
        [a.id for a in seed_arms()], LearningPolicy.LinTS(alpha=0.1, l2_lambda=4.0), seed=seed
    )
    rng, arms = np.random.default_rng(seed), [a.id for a in seed_arms()]
    fitted = False

    def choose(x: np.ndarray) -> str:
        return str(mab.predict(x[None])) if fitted else str(rng.choice(arms))

    def learn(arm: str, x: np.ndarray, utility: float) -> None:
        nonlocal fitted
        (mab.partial_fit if fitted else mab.fit)([arm], [utility], x[None])
        fitted = True

    return choose, learn


def vowpal_wabbit(seed: int) -> tuple[Choose, Learn] | None:
    """Return its contextual bandit with SquareCB, inverse-gap weighting; None where it is not there."""
    try:
        from vowpalwabbit import Workspace  # noqa: PLC0415 - it may not be there
    except ImportError:
        return None
    arms = [a.id for a in seed_arms()]
    vw = Workspace(f"--cb_explore {len(arms)} --squarecb --gamma_scale 100 --quiet")
    rng = np.random.default_rng(seed)
    chances: dict[str, float] = {}

    def told(x: np.ndarray) -> str:
        return "| " + " ".join(f"{n}:{v:.6f}" for n, v in zip(NAMES, x, strict=True))

    def choose(x: np.ndarray) -> str:
        p = np.array(vw.predict(told(x)))
        at = int(rng.choice(len(arms), p=p / p.sum()))
        chances[arms[at]] = float(p[at])
        return arms[at]

    def learn(arm: str, x: np.ndarray, utility: float) -> None:
        vw.learn(f"{arms.index(arm) + 1}:{-utility:.6f}:{max(chances[arm], 1e-3):.6f} {told(x)}")

    return choose, learn


def parts_of(scenario: Scenario, for_s: float, seed: int) -> list[Trace]:
    """Return the scenario's parts, beginning elsewhere for each seed; a part that comes again goes on."""
    parts: list[Trace] = []
    met: dict[str, int] = {}
    for_s *= 2.0 if len(scenario.parts) > 2 else 1.0  # else a regime is over before it is known
    again = {name: sum(n == name for n, _ in scenario.parts) for name, _ in scenario.parts}
    for name, speed in scenario.parts:
        whole = read_trace(TRACES / f"{name}.parquet").speed(speed)
        length_s = min(for_s / len(scenario.parts), whole.duration_s / again[name])
        start_s = (whole.duration_s - length_s * again[name]) * ((seed * 0.618) % 1.0)
        start_s += met.get(name, 0) * length_s
        met[name] = met.get(name, 0) + 1
        parts.append(whole.slice(start_s, start_s + length_s))
    return parts


def of_windows(outcome: Outcome, scenario: Scenario) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of utility and the number of requests of each window."""
    utility = utilities(outcome, scenario.objective, np.inf)[0]
    window = (outcome.arrival_s // scenario.window_s).astype(np.int64)
    return np.bincount(window, weights=utility), np.bincount(window)


def shortfall(system: np.ndarray, fixed: list[np.ndarray], counts: np.ndarray) -> float:
    """Return by how much the system is below the best fixed arm, as a share, in its worst stretch of windows."""
    n = min(STRETCH, len(counts))
    worst = -np.inf
    for at in range(len(counts) - n + 1):
        requests = max(counts[at : at + n].sum(), 1)
        best = max(f[at : at + n].sum() for f in fixed) / requests
        worst = max(worst, 1.0 - system[at : at + n].sum() / requests / max(best, 1e-9))
    return float(worst)


def windows_to_most(
    shares: list[dict[str, float]], good: set[str], first: int, last: int
) -> int | None:
    """Return after how many windows of a regime good arms have most of the shards; None: never."""
    for at in range(first, min(last, len(shares))):
        if sum(shares[at].get(a, 0.0) for a in good) >= MOST:
            return at - first
    return None


@dataclass(frozen=True)
class Run:
    """What one seed of a scenario gave."""

    utility: dict[str, float]
    shortfall: float
    adopted: tuple[tuple[str, int | None], ...]
    """Of each change of regime in which arms differ: whether it was known, and the windows it took."""
    curves: dict[str, np.ndarray]
    """Mean utility of each window."""


def run(scenario: Scenario, for_s: float, seed: int) -> Run:
    """Let every system serve the scenario."""
    parts = parts_of(scenario, for_s, seed)
    trace = splice(parts, scenario.name) if len(parts) > 1 else parts[0]
    fleet = tuple(ReplicaSpec(f"r{i}", profile(PROFILE)) for i in range(scenario.replicas))
    registry = Registry(Arms())
    alone = {
        a.id: run_arm(trace, fleet, registry.program(a.id), scenario.objective, 0)
        for a in registry.all()
    }
    served = {
        "oracle": oracle(alone, scenario.objective, scenario.window_s),
        "uniform": switch(trace, fleet, scenario, *uniform(seed)),
        "mabwiser": switch(trace, fleet, scenario, *mabwiser(seed)),
    }
    if wabbit := vowpal_wabbit(seed):
        served["vowpal wabbit"] = switch(trace, fleet, scenario, *wabbit)
    shares: list[dict[str, float]] = []
    for name, twin in (("loop, no twin", False), ("loop", True)):
        online = run_online(
            trace,
            fleet_under(fleet),
            Registry(Arms()),
            scenario.objective,
            seed,
            scenario.window_s,
            settings=LoopSettings(twin=twin),
        )
        served[name] = online.served.outcome
        shares = [
            {arm: sum(c.shards for c in s.cells if c.arm_id == arm) / SHARDS for arm in alone}
            for s in online.settled
        ]
    sums = {name: of_windows(o, scenario) for name, o in served.items()}
    fixed = {a: of_windows(o, scenario)[0] for a, o in alone.items()}
    counts = sums["oracle"][1]
    utility = {name: float(s.sum() / n.sum()) for name, (s, n) in sums.items()}
    means = {a: f.sum() / counts.sum() for a, f in fixed.items()}
    utility |= {
        "best fixed": float(max(means.values())),
        "mean fixed": float(np.mean([*means.values()])),
    }
    best = max(means, key=lambda a: means[a])
    return Run(
        utility,
        shortfall(sums["loop"][0], list(fixed.values()), counts),
        adoption(scenario, parts, fixed, counts, shares),
        {name: sums[name][0] / np.maximum(counts, 1) for name in ("oracle", "loop", "loop, no twin", "mabwiser")}
        | {"best fixed": fixed[best] / np.maximum(counts, 1)},
    )  # fmt: skip


def adoption(
    scenario: Scenario,
    parts: list[Trace],
    fixed: dict[str, np.ndarray],
    counts: np.ndarray,
    shares: list[dict[str, float]],
) -> tuple[tuple[str, int | None], ...]:
    """Return how soon good arms had most of the shards after each change of regime."""
    told: list[tuple[str, int | None]] = []
    begins_s = 0.0
    met: set[str] = set()
    for (name, _), part in zip(scenario.parts, parts, strict=True):
        # The window in which the regime changes is the old one's still.
        first = int(np.ceil(begins_s / scenario.window_s)) if begins_s else 0
        begins_s += part.duration_s
        last = int(begins_s // scenario.window_s)
        within = {
            a: f[first:last].sum() / max(counts[first:last].sum(), 1) for a, f in fixed.items()
        }
        top = max(within.values())
        good = {a for a, u in within.items() if u >= top - EQUAL}
        if first and len(good) < len(within) / 2:
            kind = "known" if name in met else "new"
            told.append((kind, windows_to_most(shares, good, first, last)))
        met.add(name)
    return tuple(told)


def decision_ms(arms: int = 16, rounds: int = 200) -> tuple[float, float]:
    """Return the milliseconds of an update with every arm and of a decision: medians."""
    rng = np.random.default_rng(0)
    bandit = LinearThompson(FEATURES)
    for i in range(arms):
        bandit.add(f"arm-{i}")
    took: list[tuple[float, float]] = []
    for _ in range(rounds):
        x = np.concatenate([[1.0], rng.normal(size=FEATURES - 1)])
        began_s = time.perf_counter()
        bandit.tick()
        for i in range(arms):
            bandit.update(f"arm-{i}", x, float(rng.random()))
        updated_s = time.perf_counter()
        bandit.probabilities(x, rng)
        took.append((updated_s - began_s, time.perf_counter() - updated_s))
    update, decide = np.median(np.array(took), axis=0) * 1e3
    return float(update), float(decide)


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Return mean and 95 % interval (Student's t) of paired differences."""
    d = np.array(differences)
    if len(d) < 2:
        return float(d.mean()), float("-inf"), float("inf")
    reach = float(t.ppf(0.975, len(d) - 1)) * d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean()), float(d.mean() - reach), float(d.mean() + reach)


def report(scenario: Scenario, runs: list[Run], took_s: float) -> dict[str, object]:
    """Print a scenario's figures and return them."""
    print(f"\n{scenario.name}: {len(runs)} seeds, {took_s:.0f} s")
    names = list(runs[0].utility)
    regret = {n: [r.utility["oracle"] - r.utility[n] for r in runs] for n in names}
    told: dict[str, object] = {}
    for name in names:
        mean, low, high = interval(
            [ours - o for ours, o in zip(regret["loop"], regret[name], strict=True)]
        )
        utility = float(np.mean([r.utility[name] for r in runs]))
        lost = float(np.mean(regret[name]))
        told[name] = {"utility": utility, "regret": lost, "loop_minus_this": [mean, low, high]}
        print(f"  {name:14s} utility {utility:.4f}  regret {lost:.4f}", end="  ")
        print(f"loop's minus this {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    others = [n for n in (*LEARNERS, "best fixed") if n in regret]
    best = min(others, key=lambda n: float(np.mean(regret[n])))
    learner = min((n for n in others if n != "best fixed"), key=lambda n: float(np.mean(regret[n])))
    for what, name in (("best other", best), ("best learner", learner)):
        ratio = float(np.mean(regret["loop"]) / max(np.mean(regret[name]), 1e-9))
        told[what] = [name, ratio]
        print(f"  regret of the loop / of the {what} ({name}): {ratio:.2f}")
    worst = [r.shortfall for r in runs]
    told["shortfall"] = [float(np.mean(worst)), max(worst)]
    print(f"  below the best human arm in the worst {STRETCH} windows:", end=" ")
    print(f"mean {np.mean(worst):.1%}, most {max(worst):.1%}")
    for kind in ("new", "known"):
        taken = [n for r in runs for k, n in r.adopted if k == kind]
        if taken:
            late = sorted(np.inf if n is None else n for n in taken)
            told[kind] = [None if n is None else n for n in taken]
            print(f"  windows to {MOST:.0%} of the shards after a {kind} regime:", end=" ")
            print(f"median {np.median(late):.0f}, all {late}")
    return told


def plot(scenario: Scenario, runs: list[Run], folder: Path) -> None:
    """Draw each window's utility, the mean over seeds."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for name in runs[0].curves:
        n = min(len(r.curves[name]) for r in runs)
        mean = np.mean([r.curves[name][:n] for r in runs], axis=0)
        axes.plot(mean, label=name, linewidth=2 if name == "loop" else 1)
    axes.set_xlabel(f"window ({scenario.window_s:g} s)")
    axes.set_ylabel("mean utility")
    axes.set_title(scenario.name)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{scenario.name.replace(', ', '-').replace(' ', '-')}.svg")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--for", dest="for_s", type=float, default=300.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if vowpal_wabbit(0) is None:
        print("Vowpal Wabbit is not installed and does not take part (pip install vowpalwabbit).")
    update, decide = decision_ms()
    print(f"bandit with 16 arms: update {update:.2f} ms, decision {decide:.2f} ms")
    told: dict[str, object] = {"update_ms": update, "decision_ms": decide}
    for scenario in SCENARIOS:
        if chosen.only not in scenario.name:
            continue
        began_s = time.perf_counter()
        runs = [run(scenario, chosen.for_s, seed) for seed in range(chosen.seeds)]
        told[scenario.name] = report(scenario, runs, time.perf_counter() - began_s)
        if chosen.plots:
            plot(scenario, runs, chosen.plots)
    if chosen.json:
        chosen.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
