"""The twin's event loop: traffic, the gateway's decisions, and R engines, in one compiled kernel.

Decisions are taken by the kernels of `arms.fleet`, as in the live gateway. At one instant a scrape
comes first, then arrivals, then clients that give up, then ends of steps, so that a step sees all
that has arrived. What replicas do besides serving is `lifecycle`'s: the loop stops where a replica
has drained or is ready, and goes on when it is told.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.fleet import (
    FleetState,
    Group,
    admits,
    arrive,
    choose,
    describe_fleet,
    describe_request,
    dispatch,
    finish,
    first_token,
    predicted_output_tokens,
    report,
    urgency,
)
from autopoiesis.arms.kernels import entry, kernel
from autopoiesis.arms.machine import PRIORITY, Program
from autopoiesis.twin.capacity import ReplicaState
from autopoiesis.twin.kv import CAPACITY
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.scheduler import (
    DECODING,
    END,
    FIRST_OUT,
    LAST_OUT,
    MAX_SEQS,
    MAX_TOKENS,
    NOWHERE,
    PLACE,
    PREFILLS,
    RUNNING,
    STEPS,
    WAITING,
    WAITING_HEAD,
    Engines,
    abort,
    complete,
    cut,
    fits,
    go_on,
    plan,
    submit,
    used_blocks,
)
from autopoiesis.twin.scheduler import count_generated as _count_generated

HELD_LIMIT = 1024
"""Requests that one group may hold; beyond it they are shed."""
HELD_LIMIT_S = 60.0
"""How long a request may be held; then it is shed, at the next scrape."""

PENDING, COMPLETED = int(Status.PENDING), int(Status.COMPLETED)
SHED, FAILED, ABORTED = int(Status.SHED), int(Status.FAILED), int(Status.ABORTED)
STARTING, DRAINING = int(ReplicaState.STARTING), int(ReplicaState.DRAINING)

NOW, INTERVAL, PATIENCE = range(3)
"""Columns of `World.clock_s`: the time, from scrape to scrape, how long a client waits."""
ARRIVED, SCRAPED, LONGEST, LEFT, STOPPED = range(5)
"""Columns of `World.cursor`: arrivals and scrapes so far; most decode steps in one event; requests
whose client's patience has ended; where the loop has stopped: a replica, or one of these two."""
RUNS, POLICY_FAILED = -1, -2
"""Values of `STOPPED` that name no replica: it has not stopped; a Python policy failed."""


class Traffic(NamedTuple):
    """The trace, and each request's shard."""

    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    max_output_tokens: NDArray[np.int64]
    session: NDArray[np.int64]
    priority: NDArray[np.float64]
    block_start: NDArray[np.int64]
    blocks: NDArray[np.int64]
    shard: NDArray[np.int64]


class Ledger(NamedTuple):
    """What became of each request so far."""

    cell: NDArray[np.int64]
    replica: NDArray[np.int64]
    status: NDArray[np.int64]
    dispatched_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    charge: NDArray[np.float64]
    """(n, 2): uncached prompt tokens and context tokens, as told to the fleet's accounting."""
    held_by: NDArray[np.int64]
    """(n,): the group that holds the request, -1 if none."""
    begun: NDArray[np.int64]
    """(n,): tokens that were out before time 0."""
    neighbour: NDArray[np.int64]
    """(n, 2): the next and the previous request held by the same group, -1 at the ends."""


class Groups(NamedTuple):
    """The G groups of the current allocation; arrays that end in `_from` are CSR starts.

    Behind those that serve shards come those that only let go what they held when another arm came
    in their place: each is the guest of one of the others, on whose replicas its requests go.
    """

    of_shard: NDArray[np.int64]
    cell_of_shard: NDArray[np.int64]
    of_replica: NDArray[np.int64]
    """(R,): -1 where a replica serves no cell."""
    code: NDArray[np.int32]
    """Instructions; of Python policies (int64) the functions' addresses instead."""
    code_from: NDArray[np.int64]
    entry: NDArray[np.int64]
    registers: NDArray[np.float64]
    registers_from: NDArray[np.int64]
    constants: NDArray[np.int64]
    members: NDArray[np.int64]
    members_from: NDArray[np.int64]
    host: NDArray[np.int64]
    """(G,): the group whose guest it is; its own number where it serves shards."""
    share: NDArray[np.float64]
    counters: NDArray[np.float64]
    """(G, 2): decisions, requests held."""
    held: NDArray[np.int64]
    """(G, 2): the oldest and the newest request held, -1 if none."""


class World(NamedTuple):
    """Everything that the event loop changes."""

    traffic: Traffic
    ledger: Ledger
    groups: Groups
    fleet: FleetState
    engines: Engines
    clock_s: NDArray[np.float64]
    cursor: NDArray[np.int64]
    random: NDArray[np.uint64]
    state: NDArray[np.int64]
    """(R,): `capacity.ReplicaState`."""
    leaving: NDArray[np.int64]
    """(R,): first of the requests (linked by `Ledger.neighbour`) whose client left in the step under
    way, -1 if none."""


@kernel
def draw(random: NDArray[np.uint64]) -> float:
    """Return one uniform number in [0, 1) (Marsaglia's xorshift, 13-7-17)."""
    x = random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    random[0] = x
    return float(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@kernel
def _program(groups: Groups, g: int) -> Program:
    return Program(
        groups.code[groups.code_from[g] : groups.code_from[g + 1]],
        groups.entry[g],
        groups.registers[groups.registers_from[g] : groups.registers_from[g + 1]],
        groups.constants[g],
    )


@kernel
def _group(groups: Groups, g: int) -> Group:
    return Group(
        groups.members[groups.members_from[g] : groups.members_from[g + 1]],
        groups.share[g],
        groups.counters[g],
    )


@kernel
def _describe_request(w: World, program: Program, i: int, now_s: float) -> None:
    t = w.traffic
    describe_request(
        program.registers,
        w.fleet,
        float(t.input_tokens[i]),
        float(t.max_output_tokens[i]),
        t.priority[i],
        now_s - t.arrival_s[i],
    )


@kernel
def _place(w: World, program: Program, group: Group, i: int, now_s: float) -> bool:
    """Place request i, whose registers are filled, and send it; False if it must be held."""
    t = w.traffic
    blocks = t.blocks[t.block_start[i] : t.block_start[i + 1]]
    r = choose(program, program.registers, w.fleet, group, blocks, t.session[i], now_s)
    if r < 0:
        return False
    _send(w, i, r, blocks, now_s)
    return True


@kernel
def _send(w: World, i: int, r: int, blocks: NDArray[np.int64], now_s: float) -> None:
    t, ledger, e = w.traffic, w.ledger, w.engines
    ledger.cell[i] = w.groups.cell_of_shard[t.shard[i]]
    ledger.replica[i] = r
    ledger.dispatched_s[i] = now_s
    if not fits(e, r, t.input_tokens[i], t.output_tokens[i]):
        ledger.status[i] = FAILED
        ledger.finished_s[i] = now_s
        return
    input_tokens = float(t.input_tokens[i])
    ledger.charge[i, 0] = dispatch(w.fleet, r, input_tokens, blocks, t.session[i])
    ledger.charge[i, 1] = input_tokens + predicted_output_tokens(
        w.fleet, float(t.max_output_tokens[i])
    )
    submit(
        e, r, i, t.input_tokens[i], t.output_tokens[i], t.block_start[i], len(blocks), t.priority[i]
    )
    counts = e.counts[r]
    if counts[STEPS] == 0:
        e.clock[r, END] = now_s
    elif (
        counts[WAITING_HEAD] == i
        and counts[RUNNING] < e.limits[r, MAX_SEQS]
        and counts[DECODING] < e.limits[r, MAX_TOKENS]
    ):
        cut(e, r, now_s)


@kernel
def _go_on(w: World, i: int, r: int) -> None:
    """Let request i, just sent, go on where it was at time 0."""
    go_on(w.engines, i, w.ledger.begun[i])
    first_token(w.fleet, r, w.ledger.charge[i, 0], w.ledger.charge[i, 1], np.nan)


@kernel
def _shed(w: World, i: int) -> None:
    w.ledger.cell[i] = w.groups.cell_of_shard[w.traffic.shard[i]]
    w.ledger.status[i] = SHED


@kernel
def _hold(w: World, g: int, i: int) -> None:
    newest = w.groups.held[g, 1]
    w.ledger.held_by[i] = g
    w.ledger.neighbour[i, 0], w.ledger.neighbour[i, 1] = -1, newest
    if newest < 0:
        w.groups.held[g, 0] = i
    else:
        w.ledger.neighbour[newest, 0] = i
    w.groups.held[g, 1] = i
    w.groups.counters[g, 1] += 1.0


@kernel
def _let_go(w: World, i: int) -> None:
    g = w.ledger.held_by[i]
    w.ledger.held_by[i] = -1
    after, before = w.ledger.neighbour[i, 0], w.ledger.neighbour[i, 1]
    if before < 0:
        w.groups.held[g, 0] = after
    else:
        w.ledger.neighbour[before, 0] = after
    if after < 0:
        w.groups.held[g, 1] = before
    else:
        w.ledger.neighbour[after, 1] = before
    w.groups.counters[g, 1] -= 1.0


@kernel
def _most_urgent(w: World, program: Program, g: int, now_s: float) -> int:
    best = w.groups.held[g, 0]
    if program.entry[PRIORITY] < 0:
        return best
    least = np.inf
    i = best
    while i >= 0:
        _describe_request(w, program, i, now_s)
        value = urgency(program, program.registers)
        if value < least:
            best, least = i, value
        i = w.ledger.neighbour[i, 0]
    return best


@kernel
def _release_held(w: World, g: int, now_s: float) -> None:
    """Place the requests that group g holds, the most urgent first, until one finds no place."""
    if w.groups.counters[g, 1] == 0.0:
        return
    program, group = _program(w.groups, g), _group(w.groups, g)
    while w.groups.counters[g, 1] > 0.0:
        describe_fleet(program.registers, w.fleet, group, now_s, draw(w.random))
        i = _most_urgent(w, program, g, now_s)
        _describe_request(w, program, i, now_s)
        if not _place(w, program, group, i, now_s):
            return
        _let_go(w, i)


@kernel
def _release_on(w: World, g: int, now_s: float) -> None:
    """Place what can be of the requests that group g and its guests hold."""
    for k in range(len(w.groups.host)):
        if w.groups.host[k] == g:
            _release_held(w, k, now_s)


@kernel
def _take_arrival(w: World, i: int, now_s: float) -> None:
    t = w.traffic
    arrive(w.fleet, float(t.input_tokens[i]), now_s)
    g = int(w.groups.of_shard[t.shard[i]])
    program, group = _program(w.groups, g), _group(w.groups, g)
    _describe_request(w, program, i, now_s)
    describe_fleet(program.registers, w.fleet, group, now_s, draw(w.random))
    if admits(program, program.registers):
        _place_or_hold(w, program, group, g, i, now_s)
    else:
        _shed(w, i)


@kernel
def _place_or_hold(w: World, program: Program, group: Group, g: int, i: int, now_s: float) -> None:
    """Place request i behind those that group g holds already; its registers are filled."""
    if w.groups.counters[g, 1] > 0.0 or not _place(w, program, group, i, now_s):
        if w.groups.counters[g, 1] < HELD_LIMIT:
            _hold(w, g, i)
        else:
            _shed(w, i)


@kernel
def _place_again(w: World, i: int, now_s: float) -> None:
    """Place a request whose replica was lost before it had answered; it was admitted already."""
    w.ledger.replica[i] = -1
    w.ledger.dispatched_s[i] = np.nan
    g = int(w.groups.of_shard[w.traffic.shard[i]])
    program, group = _program(w.groups, g), _group(w.groups, g)
    _describe_request(w, program, i, now_s)
    describe_fleet(program.registers, w.fleet, group, now_s, draw(w.random))
    _place_or_hold(w, program, group, g, i, now_s)


@kernel
def _give_up(w: World, i: int, now_s: float) -> None:
    """Let request i's client go if it has had no token yet."""
    ledger, e = w.ledger, w.engines
    if ledger.status[i] != PENDING or not np.isnan(ledger.first_token_s[i]):
        return
    ledger.status[i] = ABORTED
    ledger.finished_s[i] = now_s
    r = ledger.replica[i]
    if r < 0:
        ledger.cell[i] = w.groups.cell_of_shard[w.traffic.shard[i]]
        _let_go(w, i)
        return
    finish(w.fleet, r, ledger.charge[i, 0], ledger.charge[i, 1], False, 0.0, 0.0, False)
    cut(e, r, now_s)
    if e.slots[i, PLACE] == PREFILLS:
        ledger.neighbour[i, 0] = w.leaving[r]
        w.leaving[r] = i
    else:
        abort(e, r, i)


@kernel
def _drop_leavers(w: World, r: int) -> None:
    """Free what the clients that left during the step had in replica r."""
    i = w.leaving[r]
    while i >= 0:
        if w.engines.slots[i, PLACE] != NOWHERE:
            abort(w.engines, r, i)
        i = w.ledger.neighbour[i, 0]
    w.leaving[r] = -1


@kernel
def _end_steps(w: World, r: int, now_s: float) -> None:
    ledger, e = w.ledger, w.engines
    moved = False
    for k in range(complete(e, r, False)):
        i, bits = e.events[k, 0], e.events[k, 1]
        if ledger.status[i] == ABORTED:
            continue
        if bits & FIRST_OUT:
            moved = True
            ledger.first_token_s[i] = now_s
            first_token(
                w.fleet,
                r,
                ledger.charge[i, 0],
                ledger.charge[i, 1],
                float(now_s - ledger.dispatched_s[i]),
            )
        if bits & LAST_OUT:
            moved = True
            ledger.finished_s[i] = now_s
            ledger.status[i] = COMPLETED
            tokens = w.traffic.output_tokens[i]
            tpot_s = (
                float(now_s - ledger.first_token_s[i]) / float(tokens - 1) if tokens > 1 else 0.0
            )
            finish(
                w.fleet,
                r,
                ledger.charge[i, 0],
                ledger.charge[i, 1],
                True,
                tpot_s,
                float(tokens),
                False,
            )
    if w.leaving[r] >= 0:
        _drop_leavers(w, r)
        moved = True
    if moved and w.groups.of_replica[r] >= 0:
        _release_on(w, w.groups.of_replica[r], now_s)
    plan(e, r, now_s, w.cursor[LONGEST])


@kernel
def _scrape(w: World, now_s: float) -> None:
    e = w.engines
    for r in range(len(e.counts)):
        usage = used_blocks(e, r, now_s) / e.kv.blocks[r, CAPACITY]
        report(w.fleet, r, float(e.counts[r, RUNNING]), float(e.counts[r, WAITING]), usage)
    for g in range(len(w.groups.share)):
        _shed_overdue(w, g, now_s)
        if not _busy(w, g):
            _release_held(w, g, now_s)


@kernel
def _shed_overdue(w: World, g: int, now_s: float) -> None:
    i = w.groups.held[g, 0]
    while i >= 0 and now_s - w.traffic.arrival_s[i] > HELD_LIMIT_S:
        _let_go(w, i)
        _shed(w, i)
        i = w.groups.held[g, 0]


@kernel
def _busy(w: World, g: int) -> bool:
    """Tell whether anything will end in the group; if not, only time can free what it holds."""
    sequences = 0
    for r in _group(w.groups, g).members:
        sequences += w.engines.counts[r, RUNNING] + w.engines.counts[r, WAITING]
    return sequences > 0


@kernel
def _holds(w: World) -> bool:
    held = 0.0
    for g in range(len(w.groups.counters)):
        held += w.groups.counters[g, 1]
    return held > 0.0


@kernel
def _next_step(ends_s: NDArray[np.float64]) -> int:
    best = 0
    for r in range(1, len(ends_s)):
        if ends_s[r, END] < ends_s[best, END]:
            best = r
    return best


@kernel
def _run(w: World, until_s: float) -> None:
    t, e, clock, cursor = w.traffic, w.engines, w.clock_s, w.cursor
    while cursor[STOPPED] == RUNS:
        r = _next_step(e.clock)
        step_s = e.clock[r, END]
        arrival_s = (
            float(t.arrival_s[cursor[ARRIVED]]) if cursor[ARRIVED] < len(t.arrival_s) else np.inf
        )
        leave_s = (
            t.arrival_s[cursor[LEFT]] + clock[PATIENCE]
            if cursor[LEFT] < cursor[ARRIVED]
            else np.inf
        )
        next_s = min(step_s, arrival_s, leave_s)
        scrape_s = cursor[SCRAPED] * clock[INTERVAL]
        if next_s == np.inf and until_s == np.inf and not _holds(w):
            return
        if scrape_s <= min(next_s, until_s):
            clock[NOW] = scrape_s
            cursor[SCRAPED] += 1
            _scrape(w, scrape_s)
        elif next_s > until_s:
            clock[NOW] = until_s
            return
        elif arrival_s <= min(step_s, leave_s):
            clock[NOW] = arrival_s
            cursor[ARRIVED] += 1
            _take_arrival(w, cursor[ARRIVED] - 1, arrival_s)
        elif leave_s <= step_s:
            clock[NOW] = leave_s
            cursor[LEFT] += 1
            _give_up(w, cursor[LEFT] - 1, leave_s)
        else:
            clock[NOW] = step_s
            if w.state[r] == STARTING:
                cursor[STOPPED] = r
                return
            _end_steps(w, r, step_s)
            if w.state[r] == DRAINING and e.counts[r, STEPS] == 0:
                cursor[STOPPED] = r


@kernel
def _rehold(w: World, requests: NDArray[np.int64]) -> None:
    for i, g in requests:
        _hold(w, g, i)
    for g in range(len(w.groups.share)):
        _release_held(w, g, w.clock_s[NOW])


@kernel
def _begin(w: World, requests: NDArray[np.int64]) -> None:
    t, now_s = w.traffic, w.clock_s[NOW]
    i = 0
    while i < len(t.arrival_s) and t.arrival_s[i] < 0.0:
        r = w.ledger.replica[i]
        if r >= 0:
            _send(w, i, r, t.blocks[t.block_start[i] : t.block_start[i + 1]], now_s)
            if w.ledger.begun[i] > 0:
                _go_on(w, i, r)
        i += 1
    w.cursor[ARRIVED] = i
    _rehold(w, requests)


@kernel
def _rescue(w: World, requests: NDArray[np.int64]) -> None:
    for i in requests:
        _place_again(w, i, w.clock_s[NOW])


# --- ways in from Python ------------------------------------------------------------------------


@entry
def run(w: World, until_s: float) -> None:
    """Process every event up to and including `until_s`; with infinity, until nothing happens any more.

    Returns earlier, with the replica in `cursor[STOPPED]`, where one has drained or is ready, and
    where a Python policy failed.
    """
    _run(w, until_s)


@entry
def count_generated(w: World, counts: NDArray[np.int64]) -> None:
    """Set the tokens of each request that have come so far, (requests,)."""
    _count_generated(w.engines, w.ledger.replica, w.clock_s[NOW], counts)


@entry
def begin(w: World, requests: NDArray[np.int64]) -> None:
    """Put what came before time 0 where it is then: at its replica, or, (n, 2), held by these groups."""
    _begin(w, requests)


@entry
def rehold(w: World, requests: NDArray[np.int64]) -> None:
    """Hand these requests, (n, 2) with their groups, in order of arrival, over, and place what can be."""
    _rehold(w, requests)


@entry
def rescue(w: World, requests: NDArray[np.int64]) -> None:
    """Place these requests, in order of arrival, anew: their replica was lost before it answered."""
    _rescue(w, requests)


@entry
def release(w: World, g: int) -> None:
    """Place what group g and its guests hold and now can be placed."""
    _release_on(w, g, w.clock_s[NOW])
