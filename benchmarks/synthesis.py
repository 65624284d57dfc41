"""How fast the synthesis cycle screens, and whether what it promotes holds on traffic it never saw.

    python benchmarks/synthesis.py [--budget 20] [--seed 0] [--only NAME]

The cycle sees the middle of each trace; promoted policies are judged on the part after it, against
the incumbent that is best there in hindsight.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.synthesis.brief import Brief, Incumbent, cut
from autopoiesis.synthesis.cycle import load_kernels
from autopoiesis.synthesis.gates import Candidate, Gates
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.proposer import Parent
from autopoiesis.synthesis.race import Course, mean_utility, paired_gain
from autopoiesis.synthesis.step import step
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parent.parent / "traces"
PROFILE = "h100-llama-3-8b-tp1-bf16"
EVEN = (1.0,) * 8
UNEVEN = (1.0, 1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4)
WARMUP_SHARE = 0.25
"""Head of a window that does not count, as a share of its length."""


@dataclass(frozen=True)
class Scenario:
    """A trace, how fast it is replayed, the fleet's speeds and the objective."""

    name: str
    trace: str
    speed: float
    speeds: tuple[float, ...]
    objective: Objective
    window_s: float = 20.0


CHAT = Objective(slo_ttft_s=0.5, slo_tpot_s=0.03)
LONG = Objective(slo_ttft_s=2.0, slo_tpot_s=0.05)
SCENARIOS = (
    Scenario("conv even", "azure2023_conv_a", 45.0, EVEN, CHAT, 4.0),
    Scenario("conv uneven", "azure2023_conv_a", 32.0, UNEVEN, CHAT, 4.0),
    Scenario("code even", "azure2023_code_a", 10.0, EVEN, CHAT),
    Scenario("code uneven", "azure2023_code_a", 10.0, UNEVEN, CHAT),
    Scenario("mooncake even", "mooncake_conversation_a", 3.0, EVEN, LONG, 60.0),
    Scenario("mooncake uneven", "mooncake_conversation_a", 2.0, UNEVEN, LONG, 60.0),
)


def brief_of(scenario: Scenario, budget_s: float, seed: int) -> tuple[Brief, tuple[Trace, ...]]:
    """Return what the cycle is asked, and the windows after it that judge it."""
    whole = read_trace(TRACES / f"{scenario.trace}.parquet").speed(scenario.speed)
    middle = whole.duration_s / 2
    warmup_s = WARMUP_SHARE * scenario.window_s
    windows, holdout = cut(whole.slice(0.0, middle), scenario.window_s, warmup_s)
    later = whole.slice(middle, whole.duration_s)
    unseen, _ = cut(later, scenario.window_s, warmup_s, holdout_every=10**6, at_most=20)
    brief = Brief(
        trigger=f"benchmark: {scenario.name}",
        objective=scenario.objective,
        replicas=tuple(
            ReplicaSpec(f"r{i}", profile(PROFILE), s) for i, s in enumerate(scenario.speeds)
        ),
        windows=windows,
        holdout=holdout,
        incumbents=tuple(Incumbent(a.id, a.source, a.origin, a.name) for a in seed_arms()),
        seed=seed,
        budget_s=budget_s,
        warmup_s=warmup_s,
    )
    return brief, unseen


def utilities(source: str, brief: Brief, windows: tuple[Trace, ...]) -> list[float]:
    """Return the policy's utility per window."""
    program = compile_policy(verify(source))
    return [
        mean_utility(
            run_arm(w, brief.replicas, program, brief.objective, 97),
            brief.objective,
            brief.counting(w),
        )
        for w in windows
    ]


def screened_per_second(brief: Brief, seconds: float = 5.0) -> tuple[float, int]:
    """Return candidates proposed, verified, probed and screened per second; requests in a screen."""
    gates = Gates(brief, Course(brief.replicas, brief.objective, lambda: None))
    proposer, rng = GeneticProposer(), np.random.default_rng(brief.seed)
    parents = [Parent(r.policy.id, r.policy.source, r.name, r.gain) for r in gates.rivals]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for proposal in proposer.propose(brief.for_proposers(), parents, 24, rng):
            candidate = Candidate(proposal)
            _ = gates.verify(candidate) and gates.novelty(candidate) and gates.screen(candidate)
            count += 1
    return count / (time.perf_counter() - start), len(gates.screen_on.trace)


def report(scenario: Scenario, budget_s: float, seed: int) -> None:
    brief, unseen = brief_of(scenario, budget_s, seed)
    load_kernels(brief)
    rate, requests = screened_per_second(brief)
    row = step(brief, GeneticProposer())
    print(f"\n## {scenario.name} (seed {seed})")
    print(
        f"screen: {rate:.0f} candidates/s on {requests} requests and {len(brief.replicas)} replicas"
    )
    print(
        f"cycle: {row.seconds:.1f} s, {row.cpu_seconds:.1f} s CPU, {len(row.candidates)} candidates"
    )
    print(f"decided at: {dict(Counter(c.gate for c in row.candidates))}")
    print(row.conclusion or row.error)
    if not row.promoted:
        return
    known = {i.name: utilities(i.source, brief, unseen) for i in brief.incumbents}
    beaten = next(i.name for i in brief.incumbents if i.arm_id == row.beaten)
    hindsight = max(known, key=lambda name: float(np.mean(known[name])))
    for winner in row.candidates[: len(row.promoted)]:
        ours = utilities(winner.source, brief, unseen)
        print(f"{winner.arm_id} on {len(unseen)} later windows: {np.mean(ours):.4f}")
        for rival in dict.fromkeys((beaten, hindsight)):
            differences = np.subtract(ours, known[rival]).tolist()
            gain = paired_gain(differences, range(len(unseen)), confidence=0.95)
            role = "best then" if rival == hindsight else "best before"
            print(f"  against {rival} ({role}, {np.mean(known[rival]):.4f}): {gain}")
        print(winner.source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for scenario in SCENARIOS:
        if options.only in scenario.name:
            report(scenario, options.budget, options.seed)


if __name__ == "__main__":
    main()
