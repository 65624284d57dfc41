"""The twin: a fleet that serves a trace under cells of policies, in simulated time."""

import math
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import ROOT_TOKENS, SHARDS
from autopoiesis.arms.fleet import KV_USAGE, RUNNING, fleet_state
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.twin import events, scheduler
from autopoiesis.twin.backlog import Backlog, no_backlog
from autopoiesis.twin.capacity import CapacityChange, ReplicaSpec, ReplicaState
from autopoiesis.twin.cells import (
    SimCell,
    check,
    groups,
    identity,
    programs_of,
    python_functions,
    taken_over,
)
from autopoiesis.twin.events import Ledger, Traffic, World
from autopoiesis.twin.lifecycle import Lifecycle
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.python_policy import Functions, PythonPolicy
from autopoiesis.twin.trace import Trace

Ints = NDArray[np.int64]

_NO_LIMIT = 1 << 40


class Simulation:
    """A fleet that serves a trace; the same inputs and seed give the same outcome, bit for bit.

    Call `allocate`, then `advance`, as often as wanted. `capacity` is what happens to the replicas
    on the way; those that are not `present` are off at first. What arrives before time 0 is there at time 0,
    where `backlog` has it. A client that has had no token `patience_s` after its arrival gives up.
    `may_become` are specs that a later `change` may bring. `jumps` off makes every decode step an event
    of its own: slower, and the same to rounding.
    """

    def __init__(
        self,
        trace: Trace,
        replicas: Sequence[ReplicaSpec],
        objective: Objective,
        seed: int,
        scrape_interval_s: float = 0.5,
        *,
        capacity: Sequence[CapacityChange] = (),
        present: Sequence[bool] | None = None,
        may_become: Sequence[ReplicaSpec] = (),
        patience_s: float = math.inf,
        backlog: Backlog | None = None,
        jumps: bool = True,
    ) -> None:
        if not replicas:
            raise ValueError("a simulation needs at least one replica")
        if not scrape_interval_s > 0.0:
            raise ValueError(f"scrape_interval_s must be above 0, got {scrape_interval_s}")
        if not patience_s > 0.0:
            raise ValueError(f"patience_s must be above 0, got {patience_s}")
        backlog = backlog or no_backlog(len(trace))
        if backlog.replica.max(initial=-1) >= len(replicas):
            raise ValueError(
                f"`backlog` names replica {backlog.replica.max()}; there are {len(replicas)}, from 0"
            )
        if np.any(backlog.generated_tokens >= np.maximum(trace.output_tokens, 1)):
            raise ValueError("what is in the `backlog` must have tokens to generate yet")
        there = (True,) * len(replicas) if present is None else tuple(present)
        if len(there) != len(replicas):
            raise ValueError(f"`present` tells of {len(there)} replicas; there are {len(replicas)}")
        self._capacity = deque(sorted(capacity, key=lambda change: change.at_s))
        specs = [*replicas, *may_become, *(c.spec for c in capacity if c.spec is not None)]
        self.trace = trace
        self.replicas = tuple(replicas)
        self.objective = objective
        n, count = len(trace), len(replicas)
        blocks = np.array(trace.blocks, np.int64)
        entry_tokens = trace.block_tokens if len(trace.blocks) else 0
        largest = max(spec.profile.kv_tokens for spec in specs)
        prefix_blocks = largest // entry_tokens if entry_tokens else 0
        self._cells = 0
        self._programs: list[Program | PythonPolicy] = []
        self._backlog: Backlog | None = backlog
        """What was there at time 0, until somebody serves."""
        self._functions: list[Functions] = []
        self._world = World(
            traffic=Traffic(
                arrival_s=np.array(trace.arrival_s, np.float64),
                input_tokens=np.array(trace.input_tokens, np.int64),
                output_tokens=np.array(trace.output_tokens, np.int64),
                max_output_tokens=np.array(trace.max_output_tokens, np.int64),
                session=np.array(trace.session, np.int64),
                priority=np.array(trace.priority, np.float64),
                block_start=np.array(trace.block_start, np.int64),
                blocks=blocks,
                shard=shards(trace),
            ),
            ledger=Ledger(
                cell=np.full(n, -1, np.int64),
                replica=backlog.replica.astype(np.int64),
                status=np.zeros(n, np.int64),
                dispatched_s=np.full(n, np.nan),
                first_token_s=np.where(backlog.generated_tokens > 0, backlog.first_token_s, np.nan),
                finished_s=np.full(n, np.nan),
                charge=np.zeros((n, 2)),
                held_by=np.full(n, -1, np.int64),
                begun=backlog.generated_tokens.astype(np.int64),
                neighbour=np.full((n, 2), -1, np.int64),
            ),
            groups=groups([], count, 0),
            fleet=fleet_state(count, objective, max(1, prefix_blocks), trace.block_tokens),
            engines=scheduler.engines(
                [r.profile for r in replicas],
                [r.speed for r in replicas],
                n,
                blocks,
                entry_tokens,
                [spec.profile for spec in specs],
            ),
            clock_s=np.array([0.0, scrape_interval_s, patience_s]),
            cursor=np.array([0, 0, _NO_LIMIT if jumps else 1, 0, events.RUNS], np.int64),
            random=_random_state(seed),
            state=np.zeros(count, np.int64),
            leaving=np.full(count, -1, np.int64),
        )
        self._lifecycle = Lifecycle(self.replicas, there)
        self._lifecycle.prepare(self._world)

    @property
    def now_s(self) -> float:
        """Return the simulated time."""
        return float(self._world.clock_s[events.NOW])

    @property
    def preemptions(self) -> int:
        """Return how often a replica took a running request's blocks away, all replicas together."""
        return int(self._world.engines.counts[:, scheduler.PREEMPTIONS].sum())

    def allocate(
        self, cells: Sequence[SimCell], standing: Collection[Program | PythonPolicy] | None = None
    ) -> None:
        """Route by these cells from now on; cells of equal programs route as one group.

        Requests in flight stay where they are. What a policy in `standing` (None: any) holds leaves by
        its own ceiling and order where another takes its place, or all that it held back would be let
        loose at once; what others hold the new policy takes over. A ValueError says which replica or
        shard is wrong: every shard belongs to one cell, a replica to at most one.
        """
        self._check_policies()
        check(cells, len(self.replicas))
        w = self._world
        held, holders = self._held()
        waiting = list(zip(w.traffic.shard[held].tolist(), holders, strict=True))
        counts = zip(self._programs, w.groups.counters[:, 0].tolist(), strict=True)
        decisions = {identity(p): n for p, n in reversed([*counts])}
        guests, taken_by = taken_over(cells, waiting, standing)
        self._programs = programs_of(cells, guests)
        made = groups(cells, len(self.replicas), self._cells, guests)
        made.counters[:, 0] = [decisions.get(identity(p), 0.0) for p in self._programs]
        self._functions = python_functions(self._programs, made, self._stop)
        self._world = w._replace(groups=made)
        self._cells += len(cells)
        hold = np.column_stack([held, np.array(taken_by, np.int64)])
        if self._backlog is not None:
            self._backlog = None
            events.begin(self._world, hold)
        elif len(held):
            events.rehold(self._world, hold)
        self._check_policies()

    def _held(self) -> tuple[Ints, list[Program | PythonPolicy | None]]:
        """Return the requests that are held, in order of arrival, and by whom."""
        if self._backlog is None:
            held_by = self._world.ledger.held_by
            rows = np.flatnonzero(held_by >= 0)
            return rows, [self._programs[g] for g in held_by[rows].tolist()]
        there = self._backlog
        rows = np.flatnonzero((self._world.traffic.arrival_s < 0.0) & (there.replica < 0))
        known: list[Program | PythonPolicy | None] = [*there.holders, None]
        return rows, [known[h] for h in there.held_by[rows].tolist()]

    def advance(self, until_s: float) -> None:
        """Simulate up to `until_s` inclusive; with infinity, until nothing happens any more."""
        if not until_s >= self.now_s:
            raise ValueError(f"cannot advance to {until_s} s: it is {self.now_s} s already")
        if not len(self._world.groups.share):
            raise ValueError("allocate cells before the first advance")
        while self._capacity and self._capacity[0].at_s <= until_s:
            change = self._capacity.popleft()
            self._run(max(change.at_s, self.now_s))
            self._lifecycle.change(self._world, change)
        self._run(float(until_s))

    def change(self, change: CapacityChange) -> None:
        """Start, drain, lose ... a replica now, whatever the change's `at_s`.

        A ValueError says that there is no such replica, or that it is in no state for that.
        """
        self._check_policies()
        self._lifecycle.change(self._world, change)
        self._check_policies()

    def states(self) -> tuple[ReplicaState, ...]:
        """Return what each replica is doing."""
        return tuple(ReplicaState(state) for state in self._world.state.tolist())

    def reports(self) -> NDArray[np.float64]:
        """Return what each replica said of itself last, (R, 3): running, waiting, KV use [0..1]."""
        return self._world.fleet.replica[:, RUNNING : KV_USAGE + 1].copy()

    def replica_seconds(self) -> float:
        """Return how long replicas have been there so far, in whatever state but off [s]."""
        return self._lifecycle.replica_seconds(self._world)

    def _run(self, until_s: float) -> None:
        """Run the event loop, and take replicas at which it stops into their next state."""
        w = self._world
        while True:
            events.run(w, until_s)
            self._check_policies()
            r = int(w.cursor[events.STOPPED])
            if r == events.RUNS:
                return
            w.cursor[events.STOPPED] = events.RUNS
            self._lifecycle.go_on(w, r)

    def _stop(self) -> None:
        """End the event loop, for good: a Python policy failed."""
        self._world.cursor[events.STOPPED] = events.POLICY_FAILED

    def _check_policies(self) -> None:
        for functions in self._functions:
            functions.check()

    def outcome(self, *, client_side: bool = False) -> Outcome:
        """Return what became of each request so far, as a copy.

        Times are the engines'; `client_side` adds the HTTP path as the replica's profile has it.
        """
        w = self._world
        outcome = Outcome(
            arrival_s=w.traffic.arrival_s.copy(),
            input_tokens=w.traffic.input_tokens.copy(),
            output_tokens=w.traffic.output_tokens.copy(),
            shard=w.traffic.shard.copy(),
            cell=w.ledger.cell.copy(),
            replica=w.ledger.replica.copy(),
            dispatched_s=w.ledger.dispatched_s.copy(),
            first_token_s=w.ledger.first_token_s.copy(),
            finished_s=w.ledger.finished_s.copy(),
            status=w.ledger.status.copy(),
            cached_tokens=np.maximum(w.engines.slots[:, scheduler.CACHED], 0),
            generated_tokens=self._generated(),
        )
        return self._with_client_overhead(outcome) if client_side else outcome

    def _generated(self) -> NDArray[np.int64]:
        counts = np.zeros(len(self.trace), np.int64)
        events.count_generated(self._world, counts)
        done = self._world.ledger.status == Status.COMPLETED
        return np.where(done, self._world.traffic.output_tokens, counts)

    def _with_client_overhead(self, outcome: Outcome) -> Outcome:
        overheads = [r.profile.client for r in self.replicas]
        before, end, token = (
            np.array([getattr(o, name) for o in overheads])[outcome.replica]
            for name in ("request_s", "end_s", "token_s")
        )
        return outcome._replace(
            first_token_s=outcome.first_token_s + before + token,
            finished_s=outcome.finished_s + before + end + token * outcome.output_tokens,
        )


def run_arm(
    trace: Trace,
    replicas: Sequence[ReplicaSpec],
    program: Program | PythonPolicy,
    objective: Objective,
    seed: int,
    *,
    capacity: Sequence[CapacityChange] = (),
    present: Sequence[bool] | None = None,
) -> Outcome:
    """Serve the whole trace with one policy on the whole fleet."""
    simulation = Simulation(trace, replicas, objective, seed, capacity=capacity, present=present)
    simulation.allocate([SimCell(program, tuple(range(len(replicas))), tuple(range(SHARDS)))])
    simulation.advance(math.inf)
    return simulation.outcome()


def shards(trace: Trace) -> Ints:
    """Return each request's shard: of its session, else its root, else its place in the trace.

    `arms.allocation.shard_of`, for all requests at once.
    """
    first, end = trace.block_start[:-1], trace.block_start[1:]
    with_blocks = end > first
    key = _mixed(np.arange(1, len(trace) + 1, dtype=np.uint64))
    depth = max(ROOT_TOKENS // trace.block_tokens, 1)
    key[with_blocks] = trace.blocks[np.minimum(first + depth, end)[with_blocks] - 1].astype(
        np.uint64
    )
    with_session = trace.session != 0
    key[with_session] = trace.session[with_session].astype(np.uint64)
    return (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(58)).astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _random_state(seed: int) -> NDArray[np.uint64]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 1 << 63, 1, np.uint64)
