"""How urgent each of many held requests is, in one call."""

import numba
import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.fleet import FleetState, describe_request, urgency
from autopoiesis.arms.machine import Program


@numba.njit(cache=True)
def urgencies(
    program: Program,
    registers: NDArray[np.float64],
    state: FleetState,
    requests: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Ask the policy's `priority` for each request (lower goes first), the fleet's registers filled.

    `requests` is (n, 4): input tokens, maximal output tokens, priority class, time waited [s].
    """
    values = np.empty(len(requests))
    for i in range(len(requests)):
        describe_request(
            registers, state, requests[i, 0], requests[i, 1], requests[i, 2], requests[i, 3]
        )
        values[i] = urgency(program, registers)
    return values
