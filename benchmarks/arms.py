"""How long it takes to verify and compile a policy, to order replicas, and to ask a slow policy.

    python benchmarks/arms.py [--json FILE|-] [--seconds S]

Every figure is the best and the median of many rounds; other load on the machine lifts the median.
"""

import argparse
import itertools
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
from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.sandbox.slow_arm import SlowArm
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.arms.slow import verify_slow
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    NodeFeatures,
    OptionFeatures,
    WindowFeatures,
)
from autopoiesis.gateway.decision import AGAIN, decide

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
    """Time the ordering alone in compiled code, and the gateway's whole decision, called from Python."""
    state, group = fleet_of(replicas)
    registers, order = program.registers.copy(), np.zeros(replicas, np.int64)
    request, blocks = np.array([2000.0, 500.0, 0.0, 0.0, 0.0, 0.0]), np.arange(8, dtype=np.int64)

    def ordered() -> None:
        place_many(PLACEMENTS, program, registers, state, group, blocks, order)

    def decided() -> None:
        decide(program, registers, state, group, request, blocks, 5, 1.0, 0.4, AGAIN, False, order)

    return {
        "alone": timed(ordered, seconds, PLACEMENTS),
        "admit, order and account for it, from Python": timed(decided, seconds),
    }


SLOW = (
    "{imports}def should_reschedule(window, fleet, plan):\n    return False\n"
    "def schedule(window, fleet, plan):\n    return plan\n"
)


def slow_scene(types: int, models: int, widths: tuple[int, ...], windows: int):
    """Make a window with that much history, a fleet with that many options, and a plan."""
    gpus = tuple(GpuFeatures(f"gpu-{g}", 64, 64, 64, 0, 0, 8, 4.0, 80.0, 1.0) for g in range(types))
    names = [f"model-{m}" for m in range(models)]
    fleet = FleetFeatures(
        gpus=gpus,
        nodes=tuple(NodeFeatures(f"node-{n}", gpus[n % types].name, 8) for n in range(8 * types)),
        models=tuple(ModelFeatures(name, 16.0, 1) for name in names),
        options=tuple(
            OptionFeatures(name, gpu.name, width, 2.5, 3000.0, 20.0, 400_000, 20.0, 30.0, 10.0)
            for name in names
            for gpu in gpus
            for width in widths
        ),
        drain_s=20.0,
        stop_s=5.0,
        stable_s=600.0,
        starting=0,
        lost=0,
    )
    values = dict.fromkeys(WindowFeatures._fields, 1.0 / 3.0)
    values["arrival_rates_rps"] = tuple(float(i) / 7.0 for i in range(windows))
    values["demand"] = tuple(DemandFeatures(name, 10.0 / 3.0, 1000.0, 200.0) for name in names)
    plan = Plan([ReplicaGroup(name, gpus[0].name, 1, 2) for name in names])
    return WindowFeatures(**values), fleet, plan


def asking(seconds: float) -> dict[str, dict[str, float]]:
    """Time a question that is answered at once, and starting a process in place of a killed one."""
    figures: dict[str, dict[str, float]] = {}
    scenes = {
        "1 option, 1 window": slow_scene(1, 1, (1,), 1),
        "48 options, 60 windows": slow_scene(4, 3, (1, 2, 4, 8), 60),
    }
    with SlowArm(verify_slow(SLOW.format(imports=""))) as arm:
        for name, (window, fleet, plan) in scenes.items():
            figures[f"ask a slow policy, {name}"] = timed(
                lambda w=window, f=fleet, p=plan: arm.should_reschedule(w, f, p), seconds
            )
        window, fleet, plan = scenes["48 options, 60 windows"]
        changing = itertools.cycle((fleet, fleet._replace(lost=1)))
        figures["ask a slow policy, 48 options that changed"] = timed(
            lambda: arm.should_reschedule(window, next(changing), plan), seconds
        )
    imports = ("", "import numpy\n", "import scipy.optimize\n")
    for line in imports:
        with SlowArm(verify_slow(SLOW.format(imports=line))) as arm:

            def respawn(arm: SlowArm = arm) -> None:
                arm.close()
                arm.start()

            figures[f"start a slow policy's process, {line.strip() or 'no imports'}"] = timed(
                respawn, seconds
            )
    return figures


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
    return figures | asking(seconds)


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
