"""The fleet as policies see it: accounting on flat arrays, and the decisions taken on it.

These kernels run compiled in the gateway's picker and inside the twin's event loop: one meaning of
every feature and of every decision. Times are seconds on the caller's clock.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms import features as f
from autopoiesis.arms.kernels import entry, kernel
from autopoiesis.arms.machine import ADMIT, CEILING, PRIORITY, SCORE, Program, execute
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.prefix import (
    PrefixIndex,
    forget_replica,
    matching_blocks,
    prefix_index,
    remember,
)

IN_FLIGHT = f.Replica._fields.index("in_flight")
QUEUED_PREFILL = f.Replica._fields.index("queued_prefill_tokens")
DECODING = f.Replica._fields.index("decoding_tokens")
RUNNING = f.Replica._fields.index("running")
WAITING = f.Replica._fields.index("waiting")
KV_USAGE = f.Replica._fields.index("kv_usage")
PREFIX_HIT = f.Replica._fields.index("prefix_hit_tokens")
SESSION_HERE = f.Replica._fields.index("session_here")
TTFT = f.Replica._fields.index("ttft_ewma_s")
TPOT = f.Replica._fields.index("tpot_ewma_s")
ERROR_RATE = f.Replica._fields.index("error_rate")
SPEED = f.Replica._fields.index("speed")
AGE = f.Replica._fields.index("age_s")
DRAINING = f.Replica._fields.index("draining")
POSITION = f.Replica._fields.index("position")

LAST_ARRIVAL, GAP, GAP_SQUARED, INPUT, OUTPUT, CACHED, SEEN = range(7)
"""Columns of `FleetState.traffic`; means are exponentially weighted."""

LATENCY_WEIGHT = 0.1
"""Weight of a new observation in a replica's latency and error averages."""
TRAFFIC_WEIGHT = 0.02
"""Weight of a new observation in the traffic averages (about the last 50 requests)."""
DEFAULT_OUTPUT_TOKENS = 128.0
"""Predicted output before any request has finished."""
SESSIONS = 1 << 14
"""Sessions remembered; an older one with the same hash is overwritten."""


class FleetState(NamedTuple):
    """All that the gateway keeps of R replicas and of the traffic."""

    replica: NDArray[np.float64]
    """(R, N_REPLICA): feature rows; per-request columns are filled at each decision."""
    joined_s: NDArray[np.float64]
    """(R,): when each replica joined."""
    traffic: NDArray[np.float64]
    """(7,): averages over the arrivals of the whole fleet."""
    objective: NDArray[np.float64]
    """(2,): SLO for TTFT and TPOT [s]."""
    prefixes: PrefixIndex
    session: NDArray[np.int64]
    """(SESSIONS,): session hash of a slot, 0 if free."""
    session_replica: NDArray[np.int32]
    """(SESSIONS,): the replica that served it last."""
    block_tokens: NDArray[np.int64]
    """(1,): tokens per prefix block."""
    scores: NDArray[np.float64]
    """(R,): scratch of `choose`; the kernels allocate nothing."""


class Group(NamedTuple):
    """The replicas that one arm governs in one window, and their share of the traffic."""

    members: NDArray[np.int64]
    """(k,): indexes of replicas."""
    share: float
    """Share of the fleet's shards [0..1]."""
    counters: NDArray[np.float64]
    """(2,): decisions so far, requests held now."""


def fleet_state(
    replicas: int, objective: Objective, prefix_slots: int, block_tokens: int
) -> FleetState:
    """Make the state of a fleet with room for `replicas`, none of which has joined."""
    rows = np.zeros((replicas, f.N_REPLICA))
    rows[:, SPEED] = 1.0
    rows[:, DRAINING] = 1.0
    traffic = np.zeros(7)
    traffic[OUTPUT] = DEFAULT_OUTPUT_TOKENS
    return FleetState(
        replica=rows,
        joined_s=np.zeros(replicas),
        traffic=traffic,
        objective=np.array([objective.slo_ttft_s, objective.slo_tpot_s]),
        prefixes=prefix_index(replicas, prefix_slots),
        session=np.zeros(SESSIONS, np.int64),
        session_replica=np.full(SESSIONS, -1, np.int32),
        block_tokens=np.array([block_tokens], np.int64),
        scores=np.zeros(replicas),
    )


def group_of(members: NDArray[np.int64], share: float) -> Group:
    """Make a group whose counters start at zero."""
    return Group(members=members, share=share, counters=np.zeros(2))


# --- accounting -------------------------------------------------------------------------------


@entry
def join(state: FleetState, r: int, speed: float, prefix_blocks: int, now_s: float) -> None:
    """Replica r is there, with an empty cache of `prefix_blocks` blocks."""
    state.replica[r, :] = 0.0
    state.replica[r, SPEED] = speed
    state.joined_s[r] = now_s
    state.prefixes.capacity[r] = prefix_blocks
    forget_replica(state.prefixes, r)


@entry
def arrive(state: FleetState, input_tokens: float, now_s: float) -> None:
    """Account for an arrival of the whole fleet's traffic."""
    t = state.traffic
    if t[SEEN] > 0.0:
        gap = max(now_s - t[LAST_ARRIVAL], 0.0)
        w = max(TRAFFIC_WEIGHT, 1.0 / t[SEEN])
        t[GAP] += w * (gap - t[GAP])
        t[GAP_SQUARED] += w * (gap * gap - t[GAP_SQUARED])
    t[SEEN] += 1.0
    t[INPUT] += max(TRAFFIC_WEIGHT, 1.0 / t[SEEN]) * (input_tokens - t[INPUT])
    t[LAST_ARRIVAL] = now_s


@entry
def predicted_output_tokens(state: FleetState, max_output_tokens: float) -> float:
    """Predict a request's output length from recent ones, at most what the client allows."""
    return min(state.traffic[OUTPUT], max_output_tokens)


@kernel
def hit_tokens(state: FleetState, r: int, blocks: NDArray[np.int64], input_tokens: float) -> float:
    """Return the prompt tokens that replica r probably has cached; at least one is always computed."""
    return min(
        matching_blocks(state.prefixes, r, blocks) * float(state.block_tokens[0]),
        max(input_tokens - 1.0, 0.0),
    )


@entry
def dispatch(
    state: FleetState, r: int, input_tokens: float, blocks: NDArray[np.int64], session: int
) -> float:
    """Account for a request sent to replica r; return its uncached prompt tokens.

    The caller keeps that number for `first_token` and `finish`. `session` 0 means none.
    """
    hit = hit_tokens(state, r, blocks, input_tokens)
    uncached = input_tokens - hit
    state.replica[r, IN_FLIGHT] += 1.0
    state.replica[r, QUEUED_PREFILL] += uncached
    cached = hit / input_tokens if input_tokens > 0.0 else 0.0
    state.traffic[CACHED] += TRAFFIC_WEIGHT * (cached - state.traffic[CACHED])
    remember(state.prefixes, r, blocks)
    if session != 0:
        slot = session & (SESSIONS - 1)
        state.session[slot] = session
        state.session_replica[slot] = r
    return uncached


@kernel
def _averaged(old: float, new: float) -> float:
    return new if old == 0.0 else old + LATENCY_WEIGHT * (new - old)


@entry
def first_token(
    state: FleetState, r: int, uncached_tokens: float, context_tokens: float, ttft_s: float
) -> None:
    """Account for a request's first token; `context_tokens` is its prompt plus predicted output.

    Where `ttft_s` is NaN nobody knows how long it took.
    """
    row = state.replica[r]
    row[QUEUED_PREFILL] = max(row[QUEUED_PREFILL] - uncached_tokens, 0.0)
    row[DECODING] += context_tokens
    if not np.isnan(ttft_s):
        row[TTFT] = _averaged(row[TTFT], ttft_s)


@entry
def finish(
    state: FleetState,
    r: int,
    uncached_tokens: float,
    context_tokens: float,
    answered: bool,
    tpot_s: float,
    output_tokens: float,
    failed: bool,
) -> None:
    """Account for a request's end. `answered`: its first token was seen. `tpot_s` 0 means unknown."""
    row = state.replica[r]
    row[IN_FLIGHT] = max(row[IN_FLIGHT] - 1.0, 0.0)
    if answered:
        row[DECODING] = max(row[DECODING] - context_tokens, 0.0)
    else:
        row[QUEUED_PREFILL] = max(row[QUEUED_PREFILL] - uncached_tokens, 0.0)
    if tpot_s > 0.0:
        row[TPOT] = _averaged(row[TPOT], tpot_s)
    row[ERROR_RATE] += LATENCY_WEIGHT * ((1.0 if failed else 0.0) - row[ERROR_RATE])
    if output_tokens > 0.0 and not failed:
        state.traffic[OUTPUT] += TRAFFIC_WEIGHT * (output_tokens - state.traffic[OUTPUT])


@entry
def report(state: FleetState, r: int, running: float, waiting: float, kv_usage: float) -> None:
    """Take over what replica r says of itself."""
    state.replica[r, RUNNING] = running
    state.replica[r, WAITING] = waiting
    state.replica[r, KV_USAGE] = kv_usage


# --- decisions --------------------------------------------------------------------------------


@entry
def describe_request(
    registers: NDArray[np.float64],
    state: FleetState,
    input_tokens: float,
    max_output_tokens: float,
    priority_class: float,
    waited_s: float,
) -> None:
    """Fill the request's registers."""
    registers[f.FIRST_REQUEST] = input_tokens
    registers[f.FIRST_REQUEST + 1] = predicted_output_tokens(state, max_output_tokens)
    registers[f.FIRST_REQUEST + 2] = max_output_tokens
    registers[f.FIRST_REQUEST + 3] = priority_class
    registers[f.FIRST_REQUEST + 4] = waited_s
    registers[f.FIRST_REQUEST + 5] = state.objective[0] - waited_s


@entry
def describe_fleet(
    registers: NDArray[np.float64], state: FleetState, group: Group, now_s: float, draw: float
) -> None:
    """Fill the fleet's registers for one group of replicas."""
    rows, members = state.replica, group.members
    in_flight = kv = 0.0
    for position in range(len(members)):
        in_flight += rows[members[position], IN_FLIGHT]
        kv += rows[members[position], KV_USAGE]
    t = state.traffic
    n = float(len(group.members))
    gap = max(t[GAP], (now_s - t[LAST_ARRIVAL]) * TRAFFIC_WEIGHT)
    variance = max(t[GAP_SQUARED] - t[GAP] * t[GAP], 0.0)
    at = f.FIRST_FLEET
    registers[at] = n
    registers[at + 1] = in_flight
    registers[at + 2] = group.counters[1]
    registers[at + 3] = group.share / gap if gap > 0.0 else 0.0
    registers[at + 4] = np.sqrt(variance) / t[GAP] if t[GAP] > 0.0 else 1.0
    registers[at + 5] = t[INPUT]
    registers[at + 6] = kv / n if n > 0.0 else 0.0
    registers[at + 7] = t[CACHED]
    registers[at + 8] = state.objective[0]
    registers[at + 9] = state.objective[1]
    registers[at + 10] = draw
    registers[at + 11] = group.counters[0]


@kernel
def _describe_replica(
    registers: NDArray[np.float64],
    state: FleetState,
    r: int,
    position: int,
    hit: float,
    here: float,
    now_s: float,
) -> None:
    at = f.FIRST_REPLICA
    for column in range(f.N_REPLICA):
        registers[at + column] = state.replica[r, column]
    registers[at + PREFIX_HIT] = hit
    registers[at + SESSION_HERE] = here
    registers[at + AGE] = now_s - state.joined_s[r]
    registers[at + POSITION] = position


@entry
def admits(program: Program, registers: NDArray[np.float64]) -> bool:
    """Ask `admit`, with the request's and fleet's registers filled; a policy without it admits all."""
    start = program.entry[ADMIT]
    return start < 0 or execute(program.code, start, registers) > 0.0


@entry
def urgency(program: Program, registers: NDArray[np.float64]) -> float:
    """Ask `priority` (lower goes first), registers filled; without it the longest wait goes first."""
    start = program.entry[PRIORITY]
    return (
        execute(program.code, start, registers) if start >= 0 else -registers[f.FIRST_REQUEST + 4]
    )


@kernel
def choose(
    program: Program,
    registers: NDArray[np.float64],
    state: FleetState,
    group: Group,
    blocks: NDArray[np.int64],
    session: int,
    now_s: float,
) -> int:
    """Return the replica with the lowest score of those below their `ceiling` for a request.

    The request's and fleet's registers must be filled. -1 means that each replica is at its ceiling
    (hold the request) or that all drain. Leaves the scores in `state.scores`. Of equal scores the
    first in the group's order wins.
    """
    owner = -1
    if session != 0 and state.session[session & (SESSIONS - 1)] == session:
        owner = state.session_replica[session & (SESSIONS - 1)]
    input_tokens = registers[f.FIRST_REQUEST]
    ceiling = program.entry[CEILING]
    chosen = -1
    lowest = 0.0
    for position in range(len(group.members)):
        r = group.members[position]
        if state.replica[r, DRAINING] > 0.0:
            continue
        hit = hit_tokens(state, r, blocks, input_tokens)
        _describe_replica(registers, state, r, position, hit, 1.0 if r == owner else 0.0, now_s)
        score = execute(program.code, program.entry[SCORE], registers)
        state.scores[r] = score
        takes = ceiling < 0 or state.replica[r, IN_FLIGHT] < execute(
            program.code, ceiling, registers
        )
        if takes and (chosen < 0 or score < lowest):
            chosen, lowest = r, score
    if chosen >= 0:
        group.counters[0] += 1.0
    return chosen


@entry
def place(
    program: Program,
    registers: NDArray[np.float64],
    state: FleetState,
    group: Group,
    blocks: NDArray[np.int64],
    session: int,
    now_s: float,
    order: NDArray[np.int64],
) -> int:
    """Order the group's replicas for a request: the one to `choose`, then the others by score.

    Writes replica indexes to `order` and returns how many; 0 where there is none to choose.
    Replicas that drain are left out. Equal scores keep the group's order.
    """
    chosen = choose(program, registers, state, group, blocks, session, now_s)
    if chosen < 0:
        return 0
    order[0] = chosen
    scores, rows, members = state.scores, state.replica, group.members
    count = 1
    for position in range(len(members)):
        r = members[position]
        if r == chosen or rows[r, DRAINING] > 0.0:
            continue
        score = scores[r]
        at = count
        while at > 1 and scores[order[at - 1]] > score:
            order[at] = order[at - 1]
            at -= 1
        order[at] = r
        count += 1
    return count
