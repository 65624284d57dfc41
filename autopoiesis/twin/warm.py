"""Compile the twin's kernels, so that the first window does not wait for them."""

import numpy as np

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.latency import profile, profiles
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace

_POLICY = "def score(request, replica, fleet):\n    return replica.in_flight\n"


def warm_up() -> None:
    """Simulate two requests; the first time on a machine this compiles for a minute or two."""
    n = 2
    trace = Trace(
        arrival_s=np.zeros(n),
        input_tokens=np.full(n, 600, np.int64),
        output_tokens=np.full(n, 4, np.int64),
        max_output_tokens=np.full(n, 64, np.int64),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.arange(n + 1, dtype=np.int64),
        blocks=np.ones(n, np.int64),
        block_tokens=512,
        name="warm-up",
    )
    replicas = [ReplicaSpec("warm-up", profile(profiles()[0]))]
    run_arm(trace, replicas, compile_policy(verify(_POLICY)), Objective(), 0)
