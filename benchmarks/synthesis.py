"""How fast a synthesis cycle works, and whether what it finds is worth more than what is there already.

    python benchmarks/synthesis.py speed [--seconds 10] [--only NAME,NAME]
    python benchmarks/synthesis.py quality [--replays 800] [--seeds 3] [--only NAME,NAME] [--processes 2] [--json FILE]

`speed` keeps two cores busy, as many processes at once, and times candidates at screen level; then whole cycles
in a worker process of their own, from the trigger to the first promoted arm.

`quality` gives three ways of improving the human arms the same number of replays on the first half of a trace, each
in the product's own cycle with its own gates: evolution, tuning of the human arms' numbers, and random policies (the
best of as many as the replays allow). What each puts forward, or else the best human arm of that half, serves the
second half, which nothing was chosen on. Replays are counted, not seconds, so the machine's speed plays no part.
Intervals (95 %) are Student's t over the windows of the second half, each the mean over the seeds of search.
Regimes that the file of `--json` has already, judged with as many replays and seeds, are not judged again.
"""

import argparse
import ast
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.atomic import write_atomically
from autopoiesis.synthesis import vocabulary
from autopoiesis.synthesis.brief import Brief, Incumbent, cut
from autopoiesis.synthesis.cycle import load_kernels
from autopoiesis.synthesis.gates import Candidate, Gates
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.launch import run_worker_now
from autopoiesis.synthesis.mutation import fresh_function
from autopoiesis.synthesis.proposer import Account, Parent, Proposal, Proposer
from autopoiesis.synthesis.race import Course, Gain, mean_utility, paired_gain
from autopoiesis.synthesis.step import step
from autopoiesis.synthesis.tuner import TuningProposer
from autopoiesis.telemetry.records import CandidateRow
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parent.parent / "traces"
PROFILE = "h100-llama-3-8b-tp1-bf16"
EVEN = (1.0,) * 8
UNEVEN = (1.0, 1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4)
WARMUP_SHARE = 0.25
"""Head of a window that does not count, as a share of its length."""
JUDGED = 20
"""Most windows of the second half."""
LOOK_S = 1.0
"""What one look at the counting clock takes: one replay."""


@dataclass(frozen=True)
class Regime:
    """A trace, how fast it is replayed, the fleet's speeds and the objective."""

    name: str
    trace: str
    speed: float
    speeds: tuple[float, ...]
    objective: Objective
    window_s: float = 20.0


CHAT = Objective(slo_ttft_s=0.5, slo_tpot_s=0.03)
LONG = Objective(slo_ttft_s=2.0, slo_tpot_s=0.05)
AGENTS = Objective(slo_ttft_s=5.0, slo_tpot_s=0.05)
REGIMES = (
    Regime("conv even", "azure2023_conv_a", 45.0, EVEN, CHAT, 4.0),
    Regime("conv uneven", "azure2023_conv_a", 32.0, UNEVEN, CHAT, 4.0),
    Regime("code even", "azure2023_code_a", 10.0, EVEN, CHAT),
    Regime("code uneven", "azure2023_code_a", 10.0, UNEVEN, CHAT),
    Regime("mooncake even", "mooncake_conversation_a", 3.0, EVEN, LONG, 60.0),
    Regime("mooncake uneven", "mooncake_conversation_a", 2.0, UNEVEN, LONG, 60.0),
    Regime("agents even", "agentic_coding_a", 8.0, EVEN, AGENTS, 60.0),
    Regime("agents uneven", "agentic_coding_a", 5.0, UNEVEN, AGENTS, 60.0),
)


def brief_of(regime: Regime, budget_s: float, seed: int) -> tuple[Brief, tuple[Trace, ...]]:
    """Return what a cycle is asked on the first half of a trace, and the windows of the second."""
    whole = read_trace(TRACES / f"{regime.trace}.parquet").speed(regime.speed)
    middle = whole.duration_s / 2
    warmup_s = WARMUP_SHARE * regime.window_s
    windows, holdout = cut(whole.slice(0.0, middle), regime.window_s, warmup_s)
    later = whole.slice(middle, whole.duration_s)
    unseen, _ = cut(later, regime.window_s, warmup_s, holdout_every=10**6, at_most=JUDGED)
    brief = Brief(
        trigger=f"benchmark: {regime.name}",
        objective=regime.objective,
        replicas=tuple(
            ReplicaSpec(f"r{i}", profile(PROFILE), s) for i, s in enumerate(regime.speeds)
        ),
        windows=windows,
        holdout=holdout,
        incumbents=tuple(Incumbent(a.id, a.source, a.origin, a.name) for a in seed_arms()),
        seed=seed,
        budget_s=budget_s,
        warmup_s=warmup_s,
    )
    return brief, unseen


# --- speed ------------------------------------------------------------------------------------------


def screened_per_second(name: str, seconds: float) -> tuple[float, int]:
    """Return candidates proposed, verified, probed and screened per second; requests in a screen."""
    brief, _ = brief_of(next(r for r in REGIMES if r.name == name), 1e9, 0)
    load_kernels(brief)
    gates = Gates(replace(brief, holdout=brief.holdout[:1]), _course(brief))
    proposer, rng = GeneticProposer(), np.random.default_rng(brief.seed)
    parents = [Parent(r.id, r.policy.source, r.name, r.gain) for r in gates.rivals]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for proposal in proposer.propose(brief.for_proposers(), parents, 24, rng):
            candidate = Candidate(proposal)
            _ = gates.verify(candidate) and gates.novelty(candidate) and gates.screen(candidate)
            count += 1
    return count / (time.perf_counter() - start), len(gates.screen_on.trace)


def _course(brief: Brief) -> Course:
    return Course(brief.replicas, brief.objective, lambda: None)


def speed(seconds: float, only: str) -> None:
    """Time the screen with two cores busy, then cycles from trigger to the first promoted arm."""
    print(
        "| traffic | requests in a screen | screened /s, each of two processes | cycle [s] | promoted |"
    )
    print("| --- | --- | --- | --- | --- |")
    for regime in (r for r in REGIMES if any(part in r.name for part in only.split(","))):
        with ProcessPoolExecutor(2) as pool:
            both = list(pool.map(screened_per_second, [regime.name] * 2, [seconds] * 2))
        brief, _ = brief_of(regime, 20.0, 0)
        began_s = time.monotonic()
        row = run_worker_now(brief)
        took_s = time.monotonic() - began_s
        rates = ", ".join(f"{rate:.0f}" for rate, _ in both)
        told = f"{len(row.promoted)} of {len(row.candidates)} tried" if not row.error else row.error
        print(f"| {regime.name} | {both[0][1]} | {rates} | {took_s:.1f} | {told} |", flush=True)


# --- quality ----------------------------------------------------------------------------------------


class RandomProposer:
    """Policies written at random, without parents: what a search has to beat."""

    origin = Origin.GENETIC
    account = Account()

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Return n random policies."""
        del brief, parents
        proposals: list[Proposal] = []
        while len(proposals) < n:
            tree = ast.Module([vocabulary.random_function("score", rng)], [])
            for _ in range(int(rng.integers(0, 3))):
                fresh_function(tree, (), rng)
            policy = verify(ast.unparse(ast.fix_missing_locations(tree)))
            if policy.id not in self._seen:
                self._seen.add(policy.id)
                proposals.append(Proposal(policy.source, self.origin, thought="random"))
        return proposals

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """It does not."""


def counting_clock() -> Callable[[], float]:
    """Return a clock that goes on by `LOOK_S` at each look, of which there is one before each replay."""
    looks = 0

    def look() -> float:
        nonlocal looks
        looks += 1
        return looks * LOOK_S

    return look


WAYS: dict[str, Callable[[Callable[[], float]], Proposer]] = {
    "evolved": lambda _: GeneticProposer(),
    "tuned": TuningProposer,
    "random": lambda _: RandomProposer(),
}


@dataclass(frozen=True)
class Put:
    """What a way of improving put forward."""

    source: str
    promoted: bool
    tried: int


def put_forward(brief: Brief, way: str) -> tuple[Put, str]:
    """Return what a way puts forward with the brief's budget of replays, and the human arm it had to beat."""
    clock = counting_clock()
    row = step(brief, WAYS[way](clock), clock=clock)
    assert not row.error, row.error
    sources = {c.arm_id: c.source for c in row.candidates}
    best = next(i for i in brief.incumbents if i.arm_id == row.beaten)
    source = sources[row.promoted[0]] if row.promoted else best.source
    return Put(source, bool(row.promoted), len(row.candidates)), best.name


def utilities(source: str, brief: Brief, windows: tuple[Trace, ...]) -> np.ndarray:
    """Return the policy's utility per window."""
    program = compile_policy(verify(source))
    return np.array(
        [
            mean_utility(
                run_arm(w, brief.replicas, program, brief.objective, 97),
                brief.objective,
                brief.counting(w),
            )
            for w in windows
        ]
    )


@dataclass(frozen=True)
class Judged:
    """A regime's result."""

    regime: str
    windows: int
    best_human: str
    """Of the first half, for the first seed."""
    hindsight: str
    """The human arm that was best in the second half."""
    human: float
    """Mean utility of the best human arm of the first half in the second one."""
    means: dict[str, float]
    over_human: dict[str, Gain]
    evolved_over: dict[str, Gain]
    promoted: dict[str, int]
    """Seeds in which each way put something forward."""
    tried: dict[str, float]


def judge(name: str, replays: int, seeds: int) -> Judged:
    """Run every way with every seed on a regime, and judge what they put forward on the second half."""
    regime = next(r for r in REGIMES if r.name == name)
    served: dict[str, list[np.ndarray]] = {way: [] for way in ("human", *WAYS)}
    promoted, tried = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0.0)
    known: dict[str, np.ndarray] = {}
    names: list[str] = []
    for seed in range(seeds):
        brief, unseen = brief_of(regime, replays * LOOK_S, seed)
        by_name = {i.name: i.source for i in brief.incumbents}
        known = known or {n: utilities(s, brief, unseen) for n, s in by_name.items()}
        for way in WAYS:
            put, best = put_forward(brief, way)
            served[way].append(utilities(put.source, brief, unseen))
            promoted[way] += put.promoted
            tried[way] += put.tried / seeds
        names.append(best)
        served["human"].append(known[best])
    mean = {way: np.mean(each, axis=0) for way, each in served.items()}
    hindsight = max(known, key=lambda n: float(known[n].mean()))

    def over(way: str, other: np.ndarray) -> Gain:
        difference = (mean[way] - other).tolist()
        return paired_gain(difference, range(len(difference)), confidence=0.95)

    return Judged(
        regime=name,
        windows=len(mean["human"]),
        best_human=names[0],
        hindsight=hindsight,
        human=float(mean["human"].mean()),
        means={way: float(mean[way].mean()) for way in WAYS},
        over_human={way: over(way, mean["human"]) for way in WAYS},
        evolved_over={
            "tuned": over("evolved", mean["tuned"]),
            "random": over("evolved", mean["random"]),
            "hindsight": over("evolved", known[hindsight]),
        },
        promoted=promoted,
        tried=tried,
    )


HEAD = ("regime", "best human arm", "its utility", "evolved over it", "tuned over it", "random over it",
        "evolved over tuned", "over random", "over the human arm best in hindsight")  # fmt: skip


def quality(replays: int, seeds: int, only: str, json_file: Path | None, processes: int) -> None:
    """Judge every regime that is not judged yet, and print a row for each as it is done."""
    names = [r.name for r in REGIMES if any(part in r.name for part in only.split(","))]
    print(
        f"{replays} replays each, {seeds} seeds of search, utility in the second half of each trace\n"
    )
    print(f"| {' | '.join(HEAD)} |")
    print("| --- " * len(HEAD) + "|", flush=True)
    results = judged_before(json_file, replays, seeds)
    for result in results:
        print(table_row(result, seeds), flush=True)
    left = [name for name in names if name not in {result.regime for result in results}]
    brief, _ = brief_of(REGIMES[0], 1.0, 0)
    load_kernels(brief)
    began_s = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(judge, name, replays, seeds) for name in left]):
            results.append(done.result())
            print(table_row(results[-1], seeds), flush=True)
            took_s = time.monotonic() - began_s
            print(f"{results[-1].regime}: done after {took_s:.0f} s", file=sys.stderr, flush=True)
            if json_file:
                kept = {"replays": replays, "seeds": seeds, "results": list(map(asdict, results))}
                write_atomically(json_file, json.dumps(kept, indent=1).encode())


def judged_before(json_file: Path | None, replays: int, seeds: int) -> list[Judged]:
    """Return what an earlier run has judged with as many replays and seeds."""
    if json_file is None or not json_file.exists():
        return []
    kept = json.loads(json_file.read_bytes())
    if (kept["replays"], kept["seeds"]) != (replays, seeds):
        raise SystemExit(
            f"{json_file} has {kept['replays']} replays and {kept['seeds']} seeds; name another file."
        )
    results: list[Judged] = []
    for plain in kept["results"]:
        for name in ("over_human", "evolved_over"):
            plain[name] = {over: Gain(**gain) for over, gain in plain[name].items()}
        results.append(Judged(**plain))
    return results


def table_row(r: Judged, seeds: int) -> str:
    """Return a regime's row of the table."""
    ways = [f"{r.over_human[w]} ({r.promoted[w]} of {seeds})" for w in WAYS]
    told = [str(r.evolved_over[other]) for other in ("tuned", "random", "hindsight")]
    hindsight = f"{r.hindsight}: {told[2]}"
    return (
        f"| {' | '.join([r.regime, r.best_human, f'{r.human:.4f}', *ways, *told[:2], hindsight])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "quality"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--replays", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.seconds, options.only)
    else:
        quality(options.replays, options.seeds, options.only, options.json, options.processes)


if __name__ == "__main__":
    main()
