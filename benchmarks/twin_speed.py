"""How many requests the twin simulates per second of CPU time, and how much memory a day takes.

    python benchmarks/twin_speed.py [--trace FILE] [--profile P] [--policy NAME]... [--no-jumps] [--json FILE|-]
    python benchmarks/twin_speed.py --memory

Speed: what `autopoiesis twin speed` measures, on a sample trace. `--no-jumps` adds the rate with
every decode step an event of its own. Memory: a day of a million requests on 8 replicas, in a
process of its own, whose peak resident set is told.
"""

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path

from rich.console import Console

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.tables import pairs_table, speed_table
from autopoiesis.twin import speed
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import read_trace

TRACE = Path(__file__).parents[1] / "traces" / "azure2023_conv_a.parquet"
SOURCES = {arm.name: arm.source for arm in seed_arms()}
DAY_S, DAY_REQUESTS = 86_400.0, 1_000_000


def day(name: str) -> dict[str, float]:
    """Serve a day of a million requests and tell what it took."""
    trace = speed.conversations(DAY_REQUESTS, 0, DAY_REQUESTS / DAY_S)
    fleet = [ReplicaSpec(f"r{i}", profile(name)) for i in range(speed.FEW)]
    program = compile_policy(verify(SOURCES["least-requests"]))
    started_s = time.process_time()
    outcome = run_arm(trace, fleet, program, Objective(), 0)
    cpu_s = time.process_time() - started_s
    return {
        "requests": len(trace),
        "finished": int((~(outcome.finished_s != outcome.finished_s)).sum()),
        "cpu_s": cpu_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--profile", default="h100-llama-3-8b-tp1-bf16")
    parser.add_argument("--policy", action="append", help="human arm to measure (repeatable)")
    parser.add_argument("--no-jumps", action="store_true", help="also without jumps")
    parser.add_argument("--memory", action="store_true", help="measure a day's memory instead")
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    console = Console()
    if options.memory:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(day, (options.profile,))
        table = pairs_table("a day of a million requests", result)
    else:
        trace, policies = read_trace(options.trace), options.policy or speed.POLICIES
        report = speed.measure(trace, profile(options.profile), policies)
        result, table = report.as_dict(), speed_table(report)
        if options.no_jumps:
            slow = speed.at_rate(trace, report.load_rps_per_replica * speed.FEW)
            for row in result["policies"]:
                program = compile_policy(verify(SOURCES[row["policy"]]))
                row["without_jumps_rps"] = speed.simulated_rps(
                    slow, program, profile(options.profile), speed.FEW, jumps=False
                )
    if options.json == "-":
        json.dump(result, sys.stdout, indent=1)
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), "utf-8")
    console.print(table)
    for row in result.get("policies", ()):
        if not math.isnan(row.get("without_jumps_rps", math.nan)):
            console.print(f"{row['policy']}, no jumps: {row['without_jumps_rps']:,.0f}/s")


if __name__ == "__main__":
    main()
