"""How much the window loop loses while it learns, against the hindsight oracle and other learners.

    python benchmarks/orchestrator.py [--seeds 3] [--for 300] [--only NAME]

Every scenario is one trace, or two spliced so that the regime changes half-way. All systems serve
the same requests in the twin with the same human arms. `regret` is the utility lost against the
oracle, which takes each window from the arm that served it best.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mabwiser.mab import MAB, LearningPolicy

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import Arm
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.context import Scaler, describe
from autopoiesis.orchestrator.loop import LoopSettings
from autopoiesis.orchestrator.replay import observe, oracle, run_online, sim_cells
from autopoiesis.orchestrator.replay_fleet import fleet_under
from autopoiesis.orchestrator.reward import judge, utilities
from autopoiesis.twin.composition import splice
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.simulation import ReplicaSpec, Simulation, run_arm
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parent.parent / "traces"
PROFILE = "a100-llama-3-8b-tp1-bf16"


@dataclass(frozen=True)
class Scenario:
    """Traces with the speed of each, the fleet, the objective and the length of a window."""

    name: str
    parts: tuple[tuple[str, float], ...]
    replicas: int
    objective: Objective
    window_s: float


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


def trace_of(scenario: Scenario, for_s: float, seed: int) -> Trace:
    """Return the scenario's trace, beginning elsewhere for each seed."""
    parts = []
    for name, speed in scenario.parts:
        whole = read_trace(TRACES / f"{name}.parquet").speed(speed)
        length_s = min(for_s / len(scenario.parts), whole.duration_s)
        start_s = (whole.duration_s - length_s) * ((seed * 0.618) % 1.0)
        parts.append(whole.slice(start_s, start_s + length_s))
    return splice(parts, scenario.name) if len(parts) > 1 else parts[0]


def systems(scenario: Scenario, for_s: float, seed: int) -> dict[str, float]:
    """Return the mean utility of each system and of the fixed arms."""
    trace = trace_of(scenario, for_s, seed)
    fleet = tuple(ReplicaSpec(f"r{i}", profile(PROFILE)) for i in range(scenario.replicas))
    registry = Registry(Arms())

    def mean(outcome: Outcome) -> float:
        return float(utilities(outcome, scenario.objective, np.inf)[0].mean())

    alone = {
        a.name: run_arm(trace, fleet, registry.program(a.id), scenario.objective, 0)
        for a in registry.all()
    }
    fixed = {name: mean(o) for name, o in alone.items()}
    result = {
        "oracle": mean(oracle(alone, scenario.objective, scenario.window_s)),
        "best fixed": max(fixed.values()),
        "mean fixed": float(np.mean(list(fixed.values()))),
        "uniform": mean(switch(trace, fleet, scenario, *uniform(seed))),
        "mabwiser": mean(switch(trace, fleet, scenario, *mabwiser(seed))),
    }
    for name, twin in (("loop, no twin", False), ("loop", True)):
        run = run_online(
            trace,
            fleet_under(fleet),
            Registry(Arms()),
            scenario.objective,
            seed,
            scenario.window_s,
            settings=LoopSettings(twin=twin),
        )
        result[name] = mean(run.served.outcome)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--for", dest="for_s", type=float, default=300.0)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    for scenario in SCENARIOS:
        if chosen.only not in scenario.name:
            continue
        began_s = time.perf_counter()
        rows = [systems(scenario, chosen.for_s, seed) for seed in range(chosen.seeds)]
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        print(f"\n{scenario.name}: {chosen.seeds} seeds, {time.perf_counter() - began_s:.0f} s")
        for name, utility in mean.items():
            regret = mean["oracle"] - utility
            print(f"  {name:14s} utility {utility:.4f}  regret {regret:+.4f}")


if __name__ == "__main__":
    main()
