"""How much the evaluation's yardsticks leave to be gained, beside what the suites measure.

    python benchmarks/evaluation_room.py admission
    python benchmarks/evaluation_room.py cycles [--scenario WORD] [--seeds N] [--replays N]
    python benchmarks/evaluation_room.py plans [--scenario WORD] [--seeds N] [--contestant NAME]...

`admission`: policies of one hand-written shape (refuse while many are held, small ceilings) on the situations of
`bench dynamics --quick`. `cycles`: what one synthesis cycle on the past of each of them promotes; each policy alone,
beside the incumbent that it had to beat, on the judged part. `plans`: the lower bound on the total time, people's
slow policies, some of them with their plans improved replica by replica and taken over in stages, and contestants, on
the scenarios of `bench paper --quick`.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.evaluation.bench import traces_folder
from autopoiesis.evaluation.bound import bound_s
from autopoiesis.evaluation.effort import Effort
from autopoiesis.evaluation.evolution import Evolution, brief_on
from autopoiesis.evaluation.scenario import Situation, situation_of
from autopoiesis.evaluation.slow_contestants import SlowEffort, contestants, fixed
from autopoiesis.evaluation.slow_search import seeds, wrapped
from autopoiesis.evaluation.suites import dynamics, paper
from autopoiesis.evaluation.unit import PAST_SEEDS
from autopoiesis.orchestrator.reward import met, utilities

TOKENS, REQUESTS, HELD = (512, 1024, 2048, 4096, 8192), (16, 32, 64, 256), (0, 1, 4, None)
HORIZONS_S = (30, 60, 100, 150)
SEEDS = {arm.name: arm.source for arm in seed_arms()}


def shaped(tokens: int, requests: int, held: int | None) -> str:
    """Return least-tokens' score and deadline-slack's order with a ceiling and, maybe, an admission."""
    functions = {
        text.partition("(")[0]: text
        for name in ("deadline-slack", "least-tokens")
        for text in re.split(r"(?m)^(?=def )", SEEDS[name])
    }
    parts = [functions["def score"], functions["def priority"]]
    if held is not None:
        parts.append(
            f"def admit(request, fleet):\n    if fleet.held > {held} * fleet.replicas:\n"
            "        return 0\n    return 1\n"
        )
    parts.append(
        "def ceiling(request, replica, fleet):\n"
        f"    if replica.queued_prefill_tokens > {tokens} * replica.speed:\n        return 0\n"
        f"    return {requests} * replica.speed\n"
    )
    return "\n".join(parts)


def judged(situation: Situation, source: str) -> tuple[int, float]:
    """Return the misses and the mean utility of the judged part."""
    program = compile_policy(verify(source))
    served = situation.fleet.alone(
        situation.trace, program, situation.objective, situation.seed
    ).outcome
    served = served.select(served.arrival_s >= situation.judged_from_s)
    utility = float(utilities(served, situation.objective, np.inf)[0].mean())
    return int((~met(served, situation.objective)).sum()), utility


def admission(traces: Path) -> None:
    """Show the best of the shape beside the best human arm of each situation."""
    grid = [(x, c, h) for x in TOKENS for c in REQUESTS for h in HELD]
    human_sum, best_sum, sums = 0, 0, np.zeros(len(grid), np.int64)
    for scenario in dynamics(True).scenarios:
        for seed in (0, 1):
            situation = situation_of(scenario, seed, traces)
            human = {name: judged(situation, source) for name, source in SEEDS.items()}
            name = min(human, key=lambda n: human[n][0])
            found = [judged(situation, shaped(*point)) for point in grid]
            at = min(range(len(grid)), key=lambda i: found[i][0])
            sums += [misses for misses, _ in found]
            human_sum, best_sum = human_sum + human[name][0], best_sum + found[at][0]
            print(
                f"{scenario.name}, seed {seed}: {name} {human[name][0]}, best of the shape {found[at][0]} {grid[at]}; "
                f"utility {max(u for _, u in human.values()):.3f} and {max(u for _, u in found):.3f}",
                flush=True,
            )
    one = int(sums.argmin())
    print(
        f"all: human {human_sum}, best of the shape {best_sum}, one throughout {sums[one]} {grid[one]}"
    )


def cycles(word: str, count: int, replays: int) -> None:
    """Show what one cycle on the past promotes, and what that is worth afterwards."""
    tried, promoted, found, usual = 0, 0, 0, 0
    for scenario in dynamics(True).scenarios:
        if word not in scenario.name:
            continue
        for seed in range(count):
            situation = situation_of(scenario, seed, traces_folder())
            brief = brief_on(
                situation, situation.past, situation.fleet.replicas, seed_arms(), replays
            )
            assert brief is not None
            row = Evolution(situation, Effort()).cycle(brief)
            sources = {c.arm_id: c.source for c in row.candidates}
            beaten = next(i.source for i in brief.incumbents if i.arm_id == row.beaten)
            before, _ = judged(situation, beaten)
            after = [judged(situation, sources[arm])[0] for arm in row.promoted]
            tried, promoted = tried + len(row.candidates), promoted + len(after)
            found, usual = found + min(after, default=before), usual + before
            print(
                f"{scenario.name}, seed {seed}: {len(row.candidates)} candidates; misses of the incumbent {before}, "
                f"of what was promoted {after}",
                flush=True,
            )
    print(
        f"all: {tried} candidates, {promoted} promoted; misses {found}, of the incumbents {usual}"
    )


def plans(word: str, count: int, names: list[str]) -> None:
    """Show the bound, people's policies, those in stages and replica by replica, and contestants."""
    rng, effort = np.random.default_rng(0), paper(True).effort
    assert isinstance(effort, SlowEffort)
    for scenario in paper(True).scenarios:
        if word not in scenario.name:
            continue
        for seed in range(count):
            work = scenario.workload(scenario.trace, seed)
            past = scenario.workload(scenario.past, PAST_SEEDS + seed)
            print(f"{scenario.name}, seed {seed}: lower bound {bound_s(work):.1f}", flush=True)
            for name, genome in seeds().items():
                took = [fixed(genome)(work, past, effort, seed).state.now_s]
                if name in {"greedy", "milp", "periodic"}:
                    staged, climbing = wrapped(genome, rng)
                    tried = [climbing] + [
                        replace(staged, source=re.sub(r"STAGED_S = .*", f"STAGED_S = {h}.0", staged.source, count=1))
                        for h in HORIZONS_S
                    ]  # fmt: skip
                    took += [fixed(each)(work, past, effort, seed).state.now_s for each in tried]
                print(f"  {name}: {', '.join(f'{t:.1f}' for t in took)}", flush=True)
            for name in names:
                done = contestants()[name](work, past, effort, seed)
                print(
                    f"  {name}: {done.state.now_s:.1f} ({done.promoted} swaps, {done.harmful} harmful)"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("admission", "cycles", "plans"))
    parser.add_argument("--scenario", default="")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--replays", type=int, default=1000, help="of one cycle")
    parser.add_argument("--contestant", action="append", default=[])
    given = parser.parse_args()
    if given.what == "admission":
        admission(traces_folder())
    elif given.what == "cycles":
        cycles(given.scenario, given.seeds, given.replays)
    else:
        plans(given.scenario, given.seeds, given.contestant)
