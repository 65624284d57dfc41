"""Serve random requests under every seed arm and print all that was decided.

Run as a script, compiled or with NUMBA_DISABLE_JIT=1: both must print the same.
"""

import json
import sys

import numpy as np

from autopoiesis.arms import fleet as kernels
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms

CURVED = """
def score(request, replica, fleet):
    pressure = exp(-replica.kv_usage * 3) + log(1 + replica.in_flight) ** 1.5
    return pressure * sqrt(replica.queued_prefill_tokens + request.input_tokens % 97)
"""


def serve(program, seed, requests=120, replicas=4):
    rng = np.random.default_rng(seed)
    state = kernels.fleet_state(replicas, Objective(0.5, 0.05), prefix_slots=64, block_tokens=64)
    for r in range(replicas):
        kernels.join(state, r, [1.0, 0.5, 2.0, 1.0][r], [64, 16, 64, 0][r], 0.0)
    group = kernels.group_of(np.arange(replicas), 0.75)
    registers, order = program.registers.copy(), np.zeros(replicas, np.int64)
    roots = rng.integers(-(2**63), 2**63 - 1, (5, 24))
    now, flying, log = 0.0, [], []
    for i in range(requests):
        now += float(rng.exponential(0.02))
        blocks = roots[rng.integers(5)][: rng.integers(0, 24)]
        tokens, limit = float(len(blocks) * 64 + rng.integers(1, 64)), float(rng.integers(1, 400))
        session = int(rng.integers(0, 6))
        kernels.arrive(state, tokens, now)
        kernels.describe_request(registers, state, tokens, limit, float(i % 3 - 1), now % 0.3)
        kernels.describe_fleet(registers, state, group, now, float(rng.random()))
        admitted, urgency = kernels.admits(program, registers), kernels.urgency(program, registers)
        count = kernels.place(program, registers, state, group, blocks, session, now, order)
        log.append([bool(admitted), float(urgency), order[:count].tolist()])
        if count and admitted:
            r = int(order[0])
            flying.append((r, kernels.dispatch(state, r, tokens, blocks, session), tokens))
        while len(flying) > 20 or (flying and rng.random() < 0.3):
            r, uncached, context = flying.pop(int(rng.integers(len(flying))))
            answered = bool(rng.random() < 0.9)
            if answered:
                kernels.first_token(state, r, uncached, context, float(rng.random()))
            kernels.finish(state, r, uncached, context, answered, 0.02, 90.0, not answered)
        r = int(rng.integers(replicas))
        running = state.replica[r, kernels.IN_FLIGHT]
        kernels.report(state, r, running, max(running - 6.0, 0.0), float(rng.random()))
        group.counters[1] = i % 7
        if i == requests // 2:
            kernels.join(state, 1, 0.5, 32, now)
    return [log, state.replica.tolist(), state.traffic.tolist(), registers.tolist()]


def main():
    sources = {arm.name: arm.source for arm in seed_arms()} | {"curved": CURVED}
    programs = {name: compile_policy(verify(source)) for name, source in sources.items()}
    json.dump(
        {name: serve(program, i) for i, (name, program) in enumerate(programs.items())}, sys.stdout
    )


if __name__ == "__main__":
    main()
