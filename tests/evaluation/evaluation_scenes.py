"""Small traces, fleets and suites for tests of the evaluation."""

import numpy as np

from autopoiesis.evaluation.effort import Effort
from autopoiesis.evaluation.scenario import FleetPlan, Scenario, Segment
from autopoiesis.evaluation.suites import Suite
from autopoiesis.twin.trace import Trace, write_trace

TINY = Effort(past_replays=60, cycle_replays=60, cycle_s=5.0, cooldown_s=10.0)
FLEET = FleetPlan("a100-llama-3-8b-tp1-bf16", (1.0, 0.4))


def made_trace(name, n=900, seed=0, mean_input=800.0, mean_output=60.0, rate_rps=6.0):
    rng = np.random.default_rng(seed)
    inputs = np.maximum(rng.lognormal(np.log(mean_input), 0.6, n), 1).astype(np.int64)
    outputs = np.maximum(rng.lognormal(np.log(mean_output), 0.6, n), 1).astype(np.int64)
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1.0 / rate_rps, n)),
        input_tokens=inputs,
        output_tokens=outputs,
        max_output_tokens=np.full(n, 4096),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=512,
        name=name,
    )


def write_traces(folder):
    folder.mkdir(exist_ok=True)
    write_trace(made_trace("short", mean_output=20.0), folder / "short.parquet")
    write_trace(made_trace("long", seed=1, mean_output=120.0), folder / "long.parquet")
    return folder


SHIFT = Scenario(
    "short to long",
    (Segment("short", 0.8, 10.0),),
    (Segment("short", 0.9, 8.0), Segment("long", 0.9, 8.0)),
    FLEET,
    window_s=2.0,
)
CALM = Scenario(
    "calm", (Segment("short", 0.3, 6.0),), (Segment("short", 0.3, 6.0),), FLEET, window_s=2.0
)


def tiny_suite(contestants, scenarios=(SHIFT,), seeds=2):
    return Suite("tiny", tuple(scenarios), tuple(contestants), seeds, TINY)
