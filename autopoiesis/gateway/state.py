"""The fleet, its arms and its requests, as the picker decides on them.

Wraps the kernels of `arms.fleet`, which work on indexes, for the world of names. No I/O here.
"""

import heapq
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from autopoiesis.arms import fleet
from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.fleet import FleetState
from autopoiesis.arms.machine import LARGEST, PRIORITY, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.prefix import BLOCK_TOKENS, CHARS_PER_TOKEN
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.held import HeldQueue
from autopoiesis.gateway.serving import (
    Faults,
    NonsenseError,
    ServingArm,
    serving,
    stand_in,
)
from autopoiesis.gateway.urgency import urgencies

log = logging.getLogger(__name__)

MOST_REPLICAS = 256
PREFIX_SLOTS = 4096
"""Most prefix blocks remembered per replica (about a million tokens)."""
MOST_CHOICES, LAST_RESORTS = 4, 2
"""Longest part of an arm's order that is used, and replicas of other groups behind it."""


Addresses = tuple[str, ...]


class Member(Protocol):
    """What must be known of a replica."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def address(self) -> str:
        """`IP:port`."""
        ...

    @property
    def speed(self) -> float:
        """Its speed relative to its profile."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV cache holds, 0 if unknown."""
        ...


class Shed(Exception):  # noqa: N818 - an answer, not an error
    """The request is refused; the message says why."""


class GatewayState:
    """Decides on requests and accounts for them. `clock` gives seconds, never going back."""

    def __init__(
        self,
        objective: Objective,
        baseline: tuple[str, Program],
        rng: np.random.Generator,
        clock: Callable[[], float],
    ) -> None:
        """Start without replicas; `baseline` is the arm that serves where no other can."""
        self.window = -1
        self.faults = Faults()
        self.held = HeldQueue()
        self.clock = clock
        self._rng = rng
        self._fleet: FleetState = fleet.fleet_state(
            MOST_REPLICAS, objective, PREFIX_SLOTS, BLOCK_TOKENS
        )
        self._members: dict[str, Member] = {}
        self._index: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._free = deque(range(MOST_REPLICAS))
        self._by_address: dict[str, int] = {}
        self._kv_tokens: dict[str, int] = {}
        self._down: set[str] = set()
        self._order = np.zeros(MOST_REPLICAS, np.int64)
        self._baseline = serving(*baseline, np.empty(0, np.int64), 1.0)
        self._arms: dict[str, ServingArm] = {}
        self._arm_of_shard: list[ServingArm] = [self._baseline] * SHARDS
        self._allocation: tuple[tuple[Cell, ...], dict[str, Program]] = ((), {})
        self._starting: list[tuple[float, int, Flight]] = []
        self._started = 0

    # --- membership and allocation ------------------------------------------------------------

    def set_members(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet; those that stay keep what is known of them."""
        wanted = {m.name: m for m in members[:MOST_REPLICAS]}
        if len(members) > MOST_REPLICAS:
            self.faults.note("", f"only the first {MOST_REPLICAS} replicas are used")
        for name, old in list(self._members.items()):
            if name not in wanted or wanted[name].address != old.address:
                self._leave(name)
        for name, member in wanted.items():
            if name not in self._index:
                self._enter(member)
            self._members[name] = member
            self._fleet.replica[self._index[name], fleet.SPEED] = member.speed
        self._regroup()

    def allocate(self, window: int, cells: Sequence[Cell], programs: Mapping[str, Program]) -> None:
        """Serve by this allocation from now on; an arm without a program is replaced by the baseline."""
        self.window = window
        self._allocation = (tuple(cells), dict(programs))
        self.faults.new_allocation()
        self._regroup()

    def set_baseline(self, arm_id: str, program: Program) -> None:
        """Have this arm decide where another fails, or where none is allocated."""
        if arm_id != self._baseline.arm_id:
            everything = self._baseline.group
            self._baseline = serving(arm_id, program, everything.members, 1.0)

    def set_objective(self, objective: Objective) -> None:
        """Change the SLOs that policies see."""
        self._fleet.objective[:] = objective.slo_ttft_s, objective.slo_tpot_s

    def set_healthy(self, name: str, healthy: bool) -> bool:
        """Let a replica receive new requests, or none; tell whether that is a change."""
        if name not in self._index or healthy == (name not in self._down):
            return False
        (self._down.discard if healthy else self._down.add)(name)
        self._fleet.replica[self._index[name], fleet.DRAINING] = 0.0 if healthy else 1.0
        return True

    def report(self, name: str, running: float, waiting: float, kv_usage: float) -> None:
        """Take over what a replica says of itself."""
        if name in self._index:
            fleet.report(self._fleet, self._index[name], running, waiting, kv_usage)

    def set_kv_tokens(self, name: str, tokens: int) -> None:
        """Bound what a replica's prefix index remembers by what its KV cache holds."""
        if name in self._index and tokens > 0:
            self._kv_tokens[name] = tokens
            self._fleet.prefixes.capacity[self._index[name]] = self._prefix_blocks(tokens)

    def set_chars_per_token(self, ratio: float) -> None:
        """Translate prefix blocks, which are cut by characters, into tokens."""
        self._fleet.block_tokens[0] = max(1, round(BLOCK_TOKENS * CHARS_PER_TOKEN / ratio))

    # --- names --------------------------------------------------------------------------------

    def name_of(self, replica: int) -> str:
        """Return a replica's name, empty for -1 and for one that left."""
        return self._names.get(replica, "")

    def at_address(self, address: str) -> int:
        """Return the index of the replica at an address, -1 if none is."""
        return self._by_address.get(address, -1)

    def in_flight(self, name: str) -> int:
        """Return how many requests are on their way at a replica, by our own count."""
        return (
            int(self._fleet.replica[self._index[name], fleet.IN_FLIGHT])
            if name in self._index
            else 0
        )

    # --- decisions ----------------------------------------------------------------------------

    def decide(self, flight: Flight) -> Addresses | None:
        """Return where to try, first choice first (nowhere if there is no replica); None: it waits in `held`.

        Where the arm fails, the baseline decides. Raises `Shed` if the request is not admitted or the
        queue is full.
        """
        fleet.arrive(self._fleet, flight.input_tokens, flight.arrived_s)
        arm = self._arm(flight)
        try:
            self._ask_admission(arm, flight)
            addresses = None if self.held.has(arm.arm_id) else self._place(arm, flight)
        except Shed:
            raise
        except Exception as error:
            return self._by_baseline(arm, flight, error, self._ask_admission)
        if addresses is not None:
            return addresses
        if not self.held.add(arm.arm_id, flight):
            raise Shed("Too many requests are waiting")
        arm.group.counters[1] += 1.0
        return None

    def release(self) -> list[tuple[Flight, Addresses]]:
        """Place held requests, the most urgent first, until one finds no replica.

        Where the arm fails, the baseline places them.
        """
        released: list[tuple[Flight, Addresses]] = []
        for arm_id in self.held.arms():
            for flight in self._most_urgent_first(self._held_by(arm_id), self.held.of(arm_id)):
                arm = self._held_by(arm_id)  # another one from its last fault on
                try:
                    self._describe_held(arm, flight)
                    addresses = self._place(arm, flight)
                    if addresses is None:
                        break
                    self.drop_held(flight)
                    flight.arm_id = arm.arm_id
                except Exception as error:
                    self.drop_held(flight)
                    addresses = self._by_baseline(arm, flight, error, self._describe_held)
                released.append((flight, addresses))
        return released

    def drop_held(self, flight: Flight) -> None:
        """Take a request out of the queue."""
        if self.held.remove(flight.arm_id, flight):
            group = self._held_by(flight.arm_id).group
            group.counters[1] = max(group.counters[1] - 1.0, 0.0)
            flight.held_s = self.clock() - flight.arrived_s

    def least_loaded(self, flight: Flight) -> Addresses:
        """Place a request without any policy: where our own count is lowest."""
        order = sorted(self._index.values(), key=lambda r: self._fleet.replica[r, fleet.IN_FLIGHT])
        flight.arm_id, flight.window = self._baseline.arm_id, self.window
        return self._send(flight, order)

    # --- accounting ---------------------------------------------------------------------------

    def first_token(self, flight: Flight, replica: int) -> None:
        """Account for the first token, which came from `replica` (-1: from where it was sent)."""
        self._move(flight, replica)
        if flight.replica < 0 or flight.answered:
            return
        flight.answered = True
        flight.ttft_s = self.clock() - flight.arrived_s
        since_sent_s = self.clock() - flight.dispatched_s
        fleet.first_token(
            self._fleet, flight.replica, flight.uncached_tokens, flight.context_tokens, since_sent_s
        )

    def assume_first_tokens(self) -> None:
        """Take the first token of plain answers, which nobody sees, to be out when it usually is."""
        now_s = self.clock()
        while self._starting and self._starting[0][0] <= now_s:
            flight = heapq.heappop(self._starting)[2]
            if flight.replica >= 0 and not flight.answered:
                flight.answered = True
                usual_s = self._fleet.replica[flight.replica, fleet.TTFT]
                fleet.first_token(
                    self._fleet,
                    flight.replica,
                    flight.uncached_tokens,
                    flight.context_tokens,
                    usual_s,
                )

    def finish(
        self, flight: Flight, replica: int, tpot_s: float, output_tokens: float, failed: bool
    ) -> None:
        """Account for the end of a request that was sent (`tpot_s` 0: unknown)."""
        self._move(flight, replica)
        r = flight.replica
        if r >= 0:
            uncached, context = flight.uncached_tokens, flight.context_tokens
            fleet.finish(
                self._fleet, r, uncached, context, flight.answered, tpot_s, output_tokens, failed
            )
        flight.replica = -1

    def retract(self, flight: Flight) -> None:
        """Undo the account of a request that was not sent after all, or whose end nobody knows."""
        self.finish(flight, -1, 0.0, 0.0, failed=False)

    # --- inside -------------------------------------------------------------------------------

    def _arm(self, flight: Flight) -> ServingArm:
        arm = self._arm_of_shard[flight.shard]
        flight.arm_id, flight.window = arm.arm_id, self.window
        return arm

    def _held_by(self, arm_id: str) -> ServingArm:
        return self._arms.get(arm_id, self._baseline)

    def _ask_admission(self, arm: ServingArm, flight: Flight) -> None:
        """Describe a request that has just come; raise `Shed` unless the arm admits it."""
        self._describe(arm, flight, 0.0)
        if not fleet.admits(arm.program, arm.registers):
            raise Shed("The service is at its capacity")

    def _describe_held(self, arm: ServingArm, flight: Flight) -> None:
        self._describe(arm, flight, self.clock() - flight.arrived_s)

    def _by_baseline(
        self,
        arm: ServingArm,
        flight: Flight,
        error: Exception,
        describe: Callable[[ServingArm, Flight], None],
    ) -> Addresses:
        """Count an arm's fault, and have the baseline place this request on the arm's replicas at once.

        Where it fails too, our own count decides.
        """
        self._count_fault(arm, error)
        self.retract(flight)
        if arm.arm_id != self._baseline.arm_id:
            instead = stand_in(self._baseline, arm)
            flight.arm_id = instead.arm_id
            try:
                describe(instead, flight)
                if (addresses := self._place(instead, flight)) is not None:
                    return addresses
            except Shed:
                raise
            except Exception as second:
                self.faults.count(instead.arm_id, second)
                self.retract(flight)
        return self.least_loaded(flight)

    def _count_fault(self, arm: ServingArm, error: Exception) -> None:
        if self.faults.count(arm.arm_id, error) and arm.arm_id in self._arms:
            instead = self._arms[arm.arm_id] = stand_in(self._baseline, arm)
            self._arm_of_shard = [instead if a is arm else a for a in self._arm_of_shard]

    def _describe(self, arm: ServingArm, flight: Flight, waited_s: float) -> None:
        fleet.describe_request(
            arm.registers,
            self._fleet,
            flight.input_tokens,
            flight.max_output_tokens,
            flight.priority_class,
            waited_s,
        )
        fleet.describe_fleet(
            arm.registers, self._fleet, arm.group, self.clock(), self._rng.random()
        )

    def _place(self, arm: ServingArm, flight: Flight) -> Addresses | None:
        """Send the request by the arm's order; None if every replica of the arm is at its ceiling.

        Raises NonsenseError if no replica that may have it has a finite score.
        """
        now_s = self.clock()
        count = fleet.place(
            arm.program,
            arm.registers,
            self._fleet,
            arm.group,
            flight.blocks,
            flight.session,
            now_s,
            self._order,
        )
        if count > 0:
            if self._fleet.scores[self._order[0]] >= LARGEST:  # what was infinite or no number
                raise NonsenseError("the scores of all replicas are infinite")
            return self._send(flight, self._order[:count].tolist())
        usable = self._fleet.replica[arm.group.members, fleet.DRAINING] == 0.0
        return None if usable.any() else self._send_anywhere(flight)

    def _send_anywhere(self, flight: Flight) -> Addresses:
        """Send a request whose own replicas are all gone to any that is there."""
        there = [r for r in self._index.values() if self._fleet.replica[r, fleet.DRAINING] == 0.0]
        there.sort(key=lambda r: self._fleet.replica[r, fleet.IN_FLIGHT])
        return self._send(flight, there or list(self._index.values()))

    def _send(self, flight: Flight, order: list[int]) -> Addresses:
        if not order:
            return ()
        chosen = order[:MOST_CHOICES]
        others = [r for r in self._index.values() if r not in order]
        row = self._fleet.replica
        others.sort(key=lambda r: (row[r, fleet.DRAINING], row[r, fleet.IN_FLIGHT]))
        self._dispatch(flight, chosen[0])
        return tuple(
            self._members[self._names[r]].address for r in (*chosen, *others[:LAST_RESORTS])
        )

    def _dispatch(self, flight: Flight, replica: int) -> None:
        flight.replica = replica
        flight.dispatched_s = self.clock()
        flight.uncached_tokens = fleet.dispatch(
            self._fleet, replica, flight.input_tokens, flight.blocks, flight.session
        )
        output = fleet.predicted_output_tokens(self._fleet, flight.max_output_tokens)
        flight.context_tokens = flight.input_tokens + output
        if not flight.stream:
            usual_s = self._fleet.replica[replica, fleet.TTFT] or self._fleet.objective[0]
            self._started += 1
            heapq.heappush(self._starting, (flight.dispatched_s + usual_s, self._started, flight))

    def _move(self, flight: Flight, replica: int) -> None:
        """Account for a retry: the request ended up on another replica than it was sent to."""
        if replica in {-1, flight.replica} or flight.replica < 0:
            return
        fleet.finish(
            self._fleet,
            flight.replica,
            flight.uncached_tokens,
            flight.context_tokens,
            flight.answered,
            0.0,
            0.0,
            True,
        )
        sent_s = flight.dispatched_s
        flight.answered = False
        self._dispatch(flight, replica)
        flight.dispatched_s = sent_s

    def _most_urgent_first(self, arm: ServingArm, waiting: Sequence[Flight]) -> list[Flight]:
        if arm.program.entry[PRIORITY] < 0:
            return list(waiting)  # in order of arrival
        now_s = self.clock()
        requests = np.array(
            [
                (f.input_tokens, f.max_output_tokens, f.priority_class, now_s - f.arrived_s)
                for f in waiting
            ]
        )
        try:
            fleet.describe_fleet(arm.registers, self._fleet, arm.group, now_s, self._rng.random())
            values = urgencies(arm.program, arm.registers, self._fleet, requests)
        except Exception as error:
            self._count_fault(arm, error)
            return list(waiting)
        return [waiting[i] for i in np.argsort(values, kind="stable")]

    def _enter(self, member: Member) -> None:
        free = self._free.popleft()
        self._index[member.name], self._names[free] = free, member.name
        self._by_address[member.address] = free
        tokens = self._kv_tokens.get(member.name, member.kv_tokens)
        fleet.join(self._fleet, free, member.speed, self._prefix_blocks(tokens), self.clock())

    def _leave(self, name: str) -> None:
        index = self._index.pop(name)
        del self._names[index]
        # Last in line: requests still on their way there must not count elsewhere.
        self._free.append(index)
        del self._by_address[self._members.pop(name).address]
        self._kv_tokens.pop(name, None)
        self._down.discard(name)
        self._fleet.replica[index, fleet.DRAINING] = 1.0

    def _prefix_blocks(self, kv_tokens: int) -> int:
        return (
            min(PREFIX_SLOTS, kv_tokens // int(self._fleet.block_tokens[0]))
            if kv_tokens
            else PREFIX_SLOTS
        )

    def _regroup(self) -> None:
        """Make the groups of the current allocation anew; arms that go on keep their counters."""
        everything = np.array(sorted(self._index.values()), np.int64)
        self._baseline = serving(
            self._baseline.arm_id,
            self._baseline.program,
            everything,
            1.0,
            self._baseline.group.counters,
        )
        cells, programs = self._allocation
        arms: dict[str, ServingArm] = {}
        shards = [self._baseline] * SHARDS
        for arm_id in dict.fromkeys(cell.arm_id for cell in cells):
            own = [cell for cell in cells if cell.arm_id == arm_id]
            if arm_id not in programs:
                self.faults.note(arm_id, "its program is missing; the baseline serves instead")
                continue
            names = dict.fromkeys(name for cell in own for name in cell.replicas)
            members = np.array([self._index[n] for n in names if n in self._index], np.int64)
            served = [shard for cell in own for shard in cell.shards]
            before = self._arms.get(arm_id)
            counters = before.group.counters if before else None
            arms[arm_id] = serving(
                arm_id, programs[arm_id], members, len(served) / SHARDS, counters
            )
            if self.faults.too_many(arm_id):
                arms[arm_id] = stand_in(self._baseline, arms[arm_id])
            for shard in served:
                shards[shard] = arms[arm_id]
        self._arms, self._arm_of_shard = arms, shards
        self._reassign_held()

    def _reassign_held(self) -> None:
        """Held requests wait for the arm that their shard belongs to now."""
        flights = self.held.take_all()
        for arm in (self._baseline, *self._arms.values()):
            arm.group.counters[1] = 0.0
        for flight in flights:
            arm = self._arm(flight)
            self.held.add(arm.arm_id, flight)
            arm.group.counters[1] += 1.0
