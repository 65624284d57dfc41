"""How many requests the twin simulates per second of CPU time.

    python benchmarks/twin_speed.py [--trace traces/azure2023_conv_a.parquet] [--json FILE|-]

Replays a trace at about 70 % of what the fleet can do, with compiled policies, on 8 and on 64
replicas, and 8 replicas without jumps. Compilation is not counted.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace, read_trace

TRACE = Path(__file__).parents[1] / "traces" / "azure2023_conv_a.parquet"
REPETITIONS = 5


def simulated_rps(
    trace: Trace, program: Program, replicas: int, name: str, *, jumps: bool = True
) -> float:
    """Return requests per CPU second, the best of a few repetitions."""
    fleet = [ReplicaSpec(f"r{i}", profile(name)) for i in range(replicas)]
    best_s = math.inf
    for _ in range(REPETITIONS):
        simulation = Simulation(trace, fleet, Objective(), 0, jumps=jumps)
        simulation.allocate([SimCell(program, tuple(range(replicas)), tuple(range(SHARDS)))])
        simulation.advance(0.0)
        started_s = time.process_time()
        simulation.advance(math.inf)
        best_s = min(best_s, time.process_time() - started_s)
    return len(trace) / best_s


def saturation_rps(trace: Trace, program: Program, name: str) -> float:
    """Return the rate at which one replica serves when everything arrives at once."""
    sample = trace.head(1000).speed(1e6)
    simulation = Simulation(sample, [ReplicaSpec("r", profile(name))], Objective(), 0)
    simulation.allocate([SimCell(program, (0,), tuple(range(SHARDS)))])
    simulation.advance(math.inf)
    return len(sample) / float(np.nanmax(simulation.outcome().finished_s))


def measure(path: Path, name: str, policies: list[str]) -> dict[str, object]:
    sources = {arm.name: arm.source for arm in seed_arms()}
    programs = {policy: compile_policy(verify(sources[policy])) for policy in policies}
    whole = read_trace(path)
    load = 0.7 * saturation_rps(whole, next(iter(programs.values())), name)
    per_policy: dict[str, dict[str, float]] = {}
    for policy, program in programs.items():
        traces = {n: whole.speed(load * n * whole.duration_s / len(whole)) for n in (8, 64)}
        at_8 = simulated_rps(traces[8], program, 8, name)
        at_64 = simulated_rps(traces[64], program, 64, name)
        per_policy[policy] = {
            "compiled_rps": at_8,
            "compiled_rps_64": at_64,
            "cost_ratio_64_to_8": at_8 / at_64,
            "without_jumps_rps": simulated_rps(traces[8], program, 8, name, jumps=False),
        }
    first = per_policy[policies[0]]
    return {
        "trace": path.stem,
        "requests": len(whole),
        "profile": name,
        "load_rps_per_replica": load,
        "compiled_rps": first["compiled_rps"],
        "cost_ratio_64_to_8": first["cost_ratio_64_to_8"],
        "policies": per_policy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--profile", default="h100-llama-3-8b-tp1-bf16")
    parser.add_argument(
        "--policy", action="append", help="human arms to measure (repeatable); the first one counts"
    )
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    policies = options.policy or ["least-requests", "prefix-affinity", "weighted-scorer"]
    result = measure(options.trace, options.profile, policies)
    if options.json == "-":
        json.dump(result, sys.stdout, indent=1)
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), "utf-8")
    print(
        f"{result['trace']}: {result['load_rps_per_replica']:.1f} requests/s per replica (70 % of saturation)"
    )
    print(f"{'policy':<20}{'8 replicas':>14}{'64 replicas':>14}{'cost ratio':>12}{'no jumps':>12}")
    for policy, row in result["policies"].items():  # type: ignore[attr-defined]
        print(
            f"{policy:<20}{row['compiled_rps']:>12,.0f}/s{row['compiled_rps_64']:>12,.0f}/s"
            f"{row['cost_ratio_64_to_8']:>12.2f}{row['without_jumps_rps']:>10,.0f}/s"
        )


if __name__ == "__main__":
    main()
