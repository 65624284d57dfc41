"""The arms at work: which arm decides on a request, and what it decides.

Wraps the kernels of `arms.fleet`, which work on indexes, for the world of names. No I/O here.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autopoiesis.arms import fleet
from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.machine import PRIORITY, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway import decision
from autopoiesis.gateway.accounts import Accounts
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.held import HeldQueue
from autopoiesis.gateway.membership import MOST_REPLICAS, Member, Membership
from autopoiesis.gateway.serving import (
    Faults,
    NonsenseError,
    ServingArm,
    serving,
    stand_in,
)
from autopoiesis.gateway.urgency import urgencies

MOST_CHOICES, LAST_RESORTS = 4, 2
"""Longest part of an arm's order that is used, and replicas of other groups behind it."""

Addresses = tuple[str, ...]


class Shed(Exception):  # noqa: N818 - an answer, not an error
    """The request is refused; the message says why."""


class GatewayState:
    """Decides on requests. `clock` gives seconds, never going back."""

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
        self.membership = Membership(objective, clock)
        self.accounts = Accounts(self.membership, clock)
        self._fleet = self.membership.fleet
        self._rng = rng
        self._order = np.zeros(MOST_REPLICAS, np.int64)
        self._request = np.zeros(6)
        self._baseline = serving(*baseline, np.empty(0, np.int64), 1.0)
        self._arms: dict[str, ServingArm] = {}
        self._arm_of_shard: list[ServingArm] = [self._baseline] * SHARDS
        self._allocation: tuple[tuple[Cell, ...], dict[str, Program]] = ((), {})

    # --- what it decides by -------------------------------------------------------------------

    def set_members(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        if len(members) > MOST_REPLICAS:
            self.faults.note("", f"only the first {MOST_REPLICAS} replicas are used")
        self.membership.set_members(members)
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

    # --- decisions ----------------------------------------------------------------------------

    def decide(self, flight: Flight) -> Addresses | None:
        """Return where to try, first choice first (nowhere if there is no replica); None: it waits in `held`.

        Where the arm fails, the baseline decides. Raises `Shed` if the request is not admitted or the
        queue is full.
        """
        arm = self._arm(flight)
        try:
            addresses = self._place(arm, flight, decision.NEW, self.held.has(arm.arm_id))
        except Shed:
            raise
        except Exception as error:
            return self._by_baseline(arm, flight, error, decision.AGAIN)
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
                    addresses = self._place(arm, flight, decision.HELD)
                    if addresses is None:
                        break
                    self.drop_held(flight)
                    flight.arm_id = arm.arm_id
                except Exception as error:
                    self.drop_held(flight)
                    addresses = self._by_baseline(arm, flight, error, decision.HELD)
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
        flight.arm_id, flight.window = self._baseline.arm_id, self.window
        return self._send_anywhere(flight)

    # --- inside -------------------------------------------------------------------------------

    def _arm(self, flight: Flight) -> ServingArm:
        arm = self._arm_of_shard[flight.shard]
        flight.arm_id, flight.window = arm.arm_id, self.window
        return arm

    def _held_by(self, arm_id: str) -> ServingArm:
        return self._arms.get(arm_id, self._baseline)

    def _place(
        self, arm: ServingArm, flight: Flight, stage: int, must_wait: bool = False
    ) -> Addresses | None:
        """Send the request by the arm's order; None if every replica of the arm is at its ceiling.

        Raises `Shed`, or NonsenseError if no replica that may have it has a finite score.
        """
        now_s, request = self.clock(), self._request
        request[decision.INPUT] = flight.input_tokens
        request[decision.MAX_OUTPUT] = flight.max_output_tokens
        request[decision.PRIORITY_CLASS] = flight.priority_class
        request[decision.WAITED] = now_s - flight.arrived_s if stage == decision.HELD else 0.0
        count = decision.decide(
            arm.program,
            arm.registers,
            self._fleet,
            arm.group,
            request,
            flight.blocks,
            flight.session,
            now_s,
            self._rng.random(),
            stage,
            must_wait,
            self._order,
        )
        if count == decision.NONSENSE:
            raise NonsenseError("the scores of all replicas are infinite")
        if count == decision.SHED:
            raise Shed("The service is at its capacity")
        if count == decision.HOLD:
            if self.membership.takes_requests(arm.group.members):
                return None
            return self._send_anywhere(flight)
        return self._send(flight, self._order[:count].tolist())

    def _by_baseline(
        self, arm: ServingArm, flight: Flight, error: Exception, stage: int
    ) -> Addresses:
        """Count an arm's fault, and have the baseline place this request on the arm's replicas at once.

        Where it fails too, our own count decides.
        """
        self._count_fault(arm, error)
        self.accounts.retract(flight)
        if arm.arm_id != self._baseline.arm_id:
            instead = stand_in(self._baseline, arm)
            flight.arm_id = instead.arm_id
            try:
                if (addresses := self._place(instead, flight, stage)) is not None:
                    return addresses
            except Shed:
                raise
            except Exception as second:
                self.faults.count(instead.arm_id, second)
                self.accounts.retract(flight)
        return self.least_loaded(flight)

    def _count_fault(self, arm: ServingArm, error: Exception) -> None:
        if self.faults.count(arm.arm_id, error) and arm.arm_id in self._arms:
            instead = self._arms[arm.arm_id] = stand_in(self._baseline, arm)
            self._arm_of_shard = [instead if a is arm else a for a in self._arm_of_shard]

    def _send(self, flight: Flight, order: list[int]) -> Addresses:
        """Tell where to send a request that the kernels have placed and accounted for."""
        uncached_tokens, context_tokens = self._request[decision.UNCACHED :].tolist()
        self.accounts.sent(flight, order[0], uncached_tokens, context_tokens)
        others = self.membership.least_loaded(besides=order)
        if flight.subset is not None:
            return self._within(flight.subset, flight, (*order, *others))
        chosen = (*order[:MOST_CHOICES], *others[:LAST_RESORTS])
        return tuple(map(self.membership.address_of, chosen))

    def _within(self, subset: frozenset[str], flight: Flight, order: Sequence[int]) -> Addresses:
        """Keep of an order what a request may use; nothing is an answer, too."""
        address_of = self.membership.address_of
        allowed = [replica for replica in order if address_of(replica) in subset]
        if not allowed:
            self.accounts.retract(flight)
        elif allowed[0] != flight.replica:
            self.accounts.retract(flight)
            self.accounts.send(flight, allowed[0])
        return tuple(map(address_of, allowed[: MOST_CHOICES + LAST_RESORTS]))

    def _send_anywhere(self, flight: Flight) -> Addresses:
        """Send a request whose own replicas are all gone to the one that has least to do."""
        order = self.membership.least_loaded()
        if not order:
            return ()
        self.accounts.send(flight, order[0])
        if flight.subset is not None:
            return self._within(flight.subset, flight, order)
        return tuple(map(self.membership.address_of, order[: MOST_CHOICES + LAST_RESORTS]))

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

    def _regroup(self) -> None:
        """Make the groups of the current allocation anew; arms that go on keep their counters."""
        old, everything = self._baseline, self.membership.indexes()
        self._baseline = serving(old.arm_id, old.program, everything, 1.0, old.group.counters)
        cells, programs = self._allocation
        arms: dict[str, ServingArm] = {}
        shards = [self._baseline] * SHARDS
        for arm_id in dict.fromkeys(cell.arm_id for cell in cells):
            own = [cell for cell in cells if cell.arm_id == arm_id]
            if arm_id not in programs:
                self.faults.note(arm_id, "its program is missing; the baseline serves instead")
                continue
            names = dict.fromkeys(name for cell in own for name in cell.replicas)
            served = [shard for cell in own for shard in cell.shards]
            before = self._arms.get(arm_id)
            arms[arm_id] = serving(
                arm_id,
                programs[arm_id],
                self.membership.indexes(names),
                len(served) / SHARDS,
                before.group.counters if before else None,
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
