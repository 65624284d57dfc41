"""One decision on one request, in one call: to cross into compiled code costs more than to decide."""

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms import fleet
from autopoiesis.arms.fleet import FleetState, Group
from autopoiesis.arms.kernels import entry
from autopoiesis.arms.machine import LARGEST, Program

NONSENSE, SHED, HOLD = -2, -1, 0
"""Outcomes without a replica: no score is finite; the arm does not admit the request; it must wait."""
NEW, AGAIN, HELD = 0, 1, 2
"""Stages of a request: it has just arrived; so it has, but another arm failed on it; it was held."""
INPUT, MAX_OUTPUT, PRIORITY_CLASS, WAITED, UNCACHED, CONTEXT = range(6)
"""Columns of a request: four that tell of it, two that the decision fills."""


@entry
def decide(
    program: Program,
    registers: NDArray[np.float64],
    state: FleetState,
    group: Group,
    request: NDArray[np.float64],
    blocks: NDArray[np.int64],
    session: int,
    now_s: float,
    draw: float,
    stage: int,
    must_wait: bool,
    order: NDArray[np.int64],
) -> int:
    """Take in, admit and place a request; return how many replicas `order` begins with, or an outcome above.

    `request` is (6,), times in seconds. A new request counts as an arrival and may be shed; one that
    was held is only placed. A placed one is accounted for on `order[0]`, and its uncached prompt
    tokens and its predicted context are left in `request`.
    """
    if stage == NEW:
        fleet.arrive(state, request[INPUT], now_s)
    fleet.describe_request(
        registers,
        state,
        request[INPUT],
        request[MAX_OUTPUT],
        request[PRIORITY_CLASS],
        request[WAITED],
    )
    fleet.describe_fleet(registers, state, group, now_s, draw)
    if stage != HELD and not fleet.admits(program, registers):
        return SHED
    if must_wait:
        return HOLD
    count = fleet.place(program, registers, state, group, blocks, session, now_s, order)
    if count > 0 and state.scores[order[0]] >= LARGEST:  # what was infinite or no number
        return NONSENSE
    if count > 0:
        request[UNCACHED] = fleet.dispatch(state, order[0], request[INPUT], blocks, session)
        request[CONTEXT] = request[INPUT] + fleet.predicted_output_tokens(
            state, request[MAX_OUTPUT]
        )
    return count
