"""Behaviour without a replay: what a policy decides in a fixed set of fleet states."""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms import fleet as fleet_kernels
from autopoiesis.arms.fleet import (
    FleetState,
    Group,
    admits,
    describe_fleet,
    describe_request,
    dispatch,
    fleet_state,
    group_of,
    join,
    place,
    urgency,
)
from autopoiesis.arms.machine import CEILING, LARGEST, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.twin.simulation import ReplicaSpec

STATES, REQUESTS = 64, 4
"""Fleet states, and requests asked about in each."""
NOW_S = 1000.0


class _States(NamedTuple):
    """What differs from state to state (S) and from request to request (Q)."""

    rows: NDArray[np.float64]
    """(S, R, N_REPLICA)"""
    traffic: NDArray[np.float64]
    """(S, 7)"""
    held: NDArray[np.float64]
    """(S,)"""
    draws: NDArray[np.float64]
    """(S, Q)"""
    requests: NDArray[np.float64]
    """(S, Q, 4): input tokens, limit on output, priority class, waited [s]."""
    blocks: NDArray[np.int64]
    """(chains, blocks)"""
    depth: NDArray[np.int64]
    """(S, Q): how many blocks of its chain a request has."""
    session: NDArray[np.int64]
    """(S, Q): also tells the chain of blocks."""


@numba.njit(cache=True)
def _decide(
    program: Program,
    states: _States,
    state: FleetState,
    group: Group,
    orders: NDArray[np.int64],
    admitted: NDArray[np.bool_],
    urgencies: NDArray[np.float64],
) -> int:
    """Fill the arrays; return in how many states all scores are infinite."""
    registers = program.registers.copy()
    nonsense = 0
    for s in range(states.rows.shape[0]):
        state.replica[:] = states.rows[s]
        state.traffic[:] = states.traffic[s]
        group.counters[1] = states.held[s]
        for q in range(states.draws.shape[1]):
            group.counters[0] = s * states.draws.shape[1] + q
            one = states.requests[s, q]
            describe_request(registers, state, one[0], one[1], one[2], one[3])
            describe_fleet(registers, state, group, NOW_S, states.draws[s, q])
            admitted[s, q] = admits(program, registers)
            urgencies[s, q] = urgency(program, registers)
            session = states.session[s, q]
            blocks = states.blocks[session % states.blocks.shape[0], : states.depth[s, q]]
            count = place(program, registers, state, group, blocks, session, NOW_S, orders[s, q])
            if count > 0 and state.scores[orders[s, q, 0]] >= LARGEST:
                nonsense += 1
            orders[s, q, count:] = -1
    return nonsense


class Probe:
    """A seeded set of fleet states, from idle to overloaded, for a given fleet.

    As in the twin, no replica is younger than another and none fails: what differs only there
    cannot be judged, and counts as the same.
    """

    def __init__(self, replicas: Sequence[ReplicaSpec], objective: Objective, seed: int) -> None:
        rng = np.random.default_rng([seed, 3])
        count = len(replicas)
        self._group = group_of(np.arange(count), 1.0)
        self._state = fleet_state(count, objective, 64, BLOCK_TOKENS)
        for r, spec in enumerate(replicas):
            join(self._state, r, spec.speed, 64, 0.0)
        chains = rng.integers(1, 1 << 62, (8, 16))
        for session in range(1, 33):
            depth = int(rng.integers(1, 17))
            chain = chains[session % 8, :depth]
            dispatch(self._state, int(rng.integers(count)), depth * 256.0, chain, session)
        self._states = _draw_states(rng, replicas, objective, chains)

    def decisions(self, program: Program) -> bytes:
        """Return what the policy decides; equal bytes mean equal behaviour in all states."""
        orders, admitted, urgencies, _ = self._asked(program)
        if program.entry[CEILING] < 0:
            urgencies[:] = 0.0  # nothing is ever held, so its order does not matter
        turn = np.argsort(urgencies, axis=1, kind="stable")
        orders[~admitted] = -2
        return b"".join(part.astype(np.int8).tobytes() for part in (orders, admitted, turn))

    def nonsense(self, program: Program) -> int:
        """Return in how many of the states the policy gives no replica a finite score.

        The gateway does not serve by such an answer, and takes the arm off for the third one.
        """
        return self._asked(program)[3]

    def _asked(
        self, program: Program
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64], int]:
        shape = (STATES, REQUESTS)
        orders = np.full((*shape, len(self._group.members)), -1)
        admitted = np.empty(shape, np.bool_)
        urgencies = np.zeros(shape)
        nonsense = _decide(
            program, self._states, self._state, self._group, orders, admitted, urgencies
        )
        return orders, admitted, urgencies, nonsense


def _draw_states(
    rng: np.random.Generator,
    replicas: Sequence[ReplicaSpec],
    objective: Objective,
    chains: NDArray[np.int64],
) -> _States:
    count = len(replicas)
    shape = (STATES, count)
    load = rng.lognormal(2.0, 1.5, (STATES, 1)) * (np.arange(STATES) % 8 != 0)[:, None]
    in_flight = rng.poisson(load * rng.lognormal(0.0, 0.5, shape)).astype(float)
    rows = np.zeros((STATES, count, len(fleet_kernels.f.Replica._fields)))
    rows[..., fleet_kernels.IN_FLIGHT] = in_flight
    rows[..., fleet_kernels.QUEUED_PREFILL] = np.rint(in_flight * rng.exponential(300.0, shape))
    rows[..., fleet_kernels.DECODING] = np.rint(in_flight * rng.exponential(1000.0, shape))
    rows[..., fleet_kernels.RUNNING] = np.floor(in_flight * rng.uniform(0.3, 1.0, shape))
    rows[..., fleet_kernels.WAITING] = in_flight - rows[..., fleet_kernels.RUNNING]
    rows[..., fleet_kernels.KV_USAGE] = np.clip(in_flight * rng.uniform(0.0, 0.03, shape), 0.0, 1.0)
    rows[..., fleet_kernels.TTFT] = rng.lognormal(np.log(objective.slo_ttft_s / 2), 1.0, shape)
    rows[..., fleet_kernels.TPOT] = rng.lognormal(np.log(objective.slo_tpot_s / 2), 0.7, shape)
    rows[..., fleet_kernels.SPEED] = [spec.speed for spec in replicas]
    gap = rng.lognormal(-2.0, 1.0, STATES)
    traffic = np.zeros((STATES, 7))
    traffic[:, fleet_kernels.LAST_ARRIVAL] = NOW_S
    traffic[:, fleet_kernels.GAP] = gap
    traffic[:, fleet_kernels.GAP_SQUARED] = gap**2 * rng.uniform(1.0, 5.0, STATES)
    traffic[:, fleet_kernels.INPUT] = rng.lognormal(6.5, 0.8, STATES)
    traffic[:, fleet_kernels.OUTPUT] = rng.lognormal(5.0, 0.7, STATES)
    traffic[:, fleet_kernels.CACHED] = rng.uniform(0.0, 0.8, STATES)
    traffic[:, fleet_kernels.SEEN] = 1000.0
    asked = (STATES, REQUESTS)
    requests = np.stack(
        [
            np.rint(rng.lognormal(6.5, 1.2, asked)) + 1.0,
            np.rint(rng.lognormal(6.0, 1.0, asked)) + 1.0,
            rng.integers(-1, 2, asked).astype(float),
            np.where(rng.random(asked) < 0.5, 0.0, rng.exponential(objective.slo_ttft_s, asked)),
        ],
        axis=-1,
    )
    depth = np.minimum(requests[..., 0] // BLOCK_TOKENS, 16).astype(np.int64)
    return _States(
        rows=rows,
        traffic=traffic,
        held=rng.poisson(load[:, 0]).astype(float),
        draws=rng.random(asked),
        requests=requests,
        blocks=chains,
        depth=depth,
        session=rng.integers(1, 33, asked),
    )
