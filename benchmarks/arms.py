"""How long it takes to verify and compile a policy, and to order the replicas of a fleet.

    python benchmarks/arms.py [--json FILE|-] [--seconds S]

Every figure is the best and the median of many rounds; other load on the machine lifts the median.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from autopoiesis.arms import fleet as kernels
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms

SOURCES = {arm.name: arm.source for arm in seed_arms()}
PLACEMENTS = 1000
"""Decisions per compiled call, so that the call itself costs nothing."""


def timed(call: Callable[[], object], seconds: float, per_call: int = 1) -> dict[str, float]:
    """Return best and median time of one operation [s]."""
    call()
    rounds: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rounds) < 5:
        started = time.perf_counter()
        call()
        rounds.append((time.perf_counter() - started) / per_call)
    return {"best_s": min(rounds), "median_s": statistics.median(rounds)}


def fleet_of(replicas: int) -> tuple[kernels.FleetState, kernels.Group]:
    """Make a busy fleet whose prefix caches each hold some of the blocks."""
    rng = np.random.default_rng(7)
    state = kernels.fleet_state(replicas, Objective(), 4096, 256)
    for r in range(replicas):
        kernels.join(state, r, 1.0, 4096, 0.0)
        for _ in range(8):
            blocks = np.arange(rng.integers(1, 16), dtype=np.int64)
            kernels.dispatch(state, r, 4000.0, blocks, 0)
        kernels.report(
            state, r, float(rng.integers(8)), float(rng.integers(3)), float(rng.random())
        )
    return state, kernels.group_of(np.arange(replicas), 1.0)


@numba.njit
def place_many(times, program, registers, state, group, blocks, order):
    """Decide as the twin does: from compiled code."""
    for i in range(times):
        kernels.describe_request(registers, state, 2000.0, 500.0, 0.0, 0.0)
        kernels.describe_fleet(registers, state, group, 1.0, i / times)
        kernels.place(program, registers, state, group, blocks, 5, 1.0, order)


def ordering(program: Program, replicas: int, seconds: float) -> dict[str, dict[str, float]]:
    """Time one decision, from compiled code and with the calls from Python that the gateway makes."""
    state, group = fleet_of(replicas)
    registers, order = program.registers.copy(), np.zeros(replicas, np.int64)
    blocks = np.arange(8, dtype=np.int64)

    def from_python() -> None:
        kernels.describe_request(registers, state, 2000.0, 500.0, 0.0, 0.0)
        kernels.describe_fleet(registers, state, group, 1.0, 0.4)
        kernels.place(program, registers, state, group, blocks, 5, 1.0, order)

    def from_kernel() -> None:
        place_many(PLACEMENTS, program, registers, state, group, blocks, order)

    return {
        "from_kernel": timed(from_kernel, seconds, PLACEMENTS),
        "from_python": timed(from_python, seconds),
    }


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Return all figures, by name."""
    typical = SOURCES["weighted-scorer"]
    policy = verify(typical)
    figures = {
        "verify": timed(lambda: verify(typical), seconds),
        "compile": timed(lambda: compile_policy(policy), seconds),
        "verify and compile": timed(lambda: compile_policy(verify(typical)), seconds),
    }
    for name in ("round-robin", "weighted-scorer"):
        program = compile_policy(verify(SOURCES[name]))
        for replicas in (8, 64):
            for caller, figure in ordering(program, replicas, seconds).items():
                figures[f"order {replicas} replicas, {name}, {caller}"] = figure
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, - for stdout")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per figure (default 0.5)")
    options = parser.parse_args()
    figures = measure(options.seconds)
    text = json.dumps(figures, indent=2)
    if options.json == "-":
        print(text)
        return
    if options.json:
        Path(options.json).write_text(text + "\n", "utf-8")
    table = Table("operation", "best", "median")
    for name, figure in figures.items():
        best, median = figure["best_s"] * 1e6, figure["median_s"] * 1e6
        table.add_row(name, f"{best:.2f} us", f"{median:.2f} us")
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
