"""The arms at work: which arm decides on a request, and what it decides.

Wraps the kernels of `arms.fleet`, which work on indexes, for the world of names. No I/O here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from autopoiesis.arms import fleet
from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.machine import PRIORITY, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway import decision
from autopoiesis.gateway.accounts import Accounts
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.held import HeldQueues, Queue
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
_NOBODYS = Queue("", "")
"""Where requests of shards without an arm wait: the baseline serves them."""


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
        self.held = HeldQueues()
        self.clock = clock
        self.membership = Membership(objective, clock)
        self.accounts = Accounts(self.membership, clock)
        self._fleet = self.membership.fleet
        self._rng = rng
        self._order = np.zeros(MOST_REPLICAS, np.int64)
        self._request = np.zeros(6)
        self._baseline = serving(*baseline, np.empty(0, np.int64), 1.0)
        self._arms: dict[Queue, ServingArm] = {_NOBODYS: self._baseline}
        """Who decides on what comes or waits there."""
        self._queue_of_shard: list[Queue] = [_NOBODYS] * SHARDS
        self._cells: tuple[Cell, ...] = ()
        self._programs: dict[str, Program] = {}
        self._standing: frozenset[str] = frozenset()

    # --- what it decides by -------------------------------------------------------------------

    def set_members(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        if len(members) > MOST_REPLICAS:
            self.faults.note("", f"only the first {MOST_REPLICAS} replicas are used")
        self.membership.set_members(members)
        self._regroup()

    def allocate(
        self,
        window: int,
        cells: Sequence[Cell],
        programs: Mapping[str, Program],
        standing: Collection[str] = (),
    ) -> None:
        """Serve by this allocation from now on; an arm without a program is replaced by the baseline.

        What an arm in `standing` holds leaves by its own ceiling and order where another arm takes its
        place, or all that it held back would be let loose at once; what others hold the new arm takes over.
        """
        self.window = window
        self._cells, self._programs = tuple(cells), dict(programs)
        self._standing = frozenset(standing)
        self.faults.new_allocation()
        self._regroup()

    def set_baseline(self, arm_id: str, program: Program) -> None:
        """Have this arm decide where another fails, or where none is allocated."""
        if arm_id != self._baseline.arm_id:
            everything = self._baseline.group
            self._baseline = serving(arm_id, program, everything.members, 1.0)
            self._arms[_NOBODYS] = self._baseline

    def set_objective(self, objective: Objective) -> None:
        """Change the SLOs that policies see."""
        self._fleet.objective[:] = objective.slo_ttft_s, objective.slo_tpot_s

    # --- decisions ----------------------------------------------------------------------------

    def decide(self, flight: Flight) -> Addresses | None:
        """Return where to try, first choice first (nowhere if there is no replica); None: it waits in `held`.

        Where the arm fails, the baseline decides. Raises `Shed` if the request is not admitted or the
        queue is full.
        """
        queue = self._queue_of_shard[flight.shard]
        arm = self._arms[queue]
        flight.arm_id, flight.window = arm.arm_id, self.window
        try:
            addresses = self._place(arm, flight, decision.NEW, self.held.has(queue))
        except Shed:
            raise
        except Exception as error:
            return self._by_baseline(arm, flight, error, decision.AGAIN)
        if addresses is not None:
            return addresses
        if self.held.is_full(queue):
            raise Shed("Too many requests are waiting")
        self.held.add(queue, flight)
        arm.group.counters[1] += 1.0
        return None

    def release(self) -> list[tuple[Flight, Addresses]]:
        """Place held requests, the most urgent of each queue first, until one finds no replica.

        Where the arm fails, the baseline places them.
        """
        released: list[tuple[Flight, Addresses]] = []
        for queue in self.held.queues():
            for flight in self._most_urgent_first(self._arms[queue], self.held.of(queue)):
                arm = self._arms[queue]  # another one from its last fault on
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
        """Take a request out of the queue that it waits in."""
        if (queue := self.held.remove(flight)) is not None:
            group = self._arms[queue].group
            group.counters[1] = max(group.counters[1] - 1.0, 0.0)
            flight.held_s = self.clock() - flight.arrived_s

    def least_loaded(self, flight: Flight) -> Addresses:
        """Place a request without any policy: where our own count is lowest."""
        flight.arm_id, flight.window = self._baseline.arm_id, self.window
        return self._send_anywhere(flight)

    # --- inside -------------------------------------------------------------------------------

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
        if self.faults.count(arm.arm_id, error):
            self._arms |= {
                queue: stand_in(self._baseline, failing)
                for queue, failing in self._arms.items()
                if failing.arm_id == arm.arm_id and queue != _NOBODYS
            }

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
        before, self._arms = self._arms, {_NOBODYS: self._baseline}
        self._queue_of_shard = [_NOBODYS] * SHARDS
        for arm_id in dict.fromkeys(cell.arm_id for cell in self._cells):
            own = [cell for cell in self._cells if cell.arm_id == arm_id]
            if arm_id not in self._programs:
                self.faults.note(arm_id, "its program is missing; the baseline serves instead")
                continue
            names = dict.fromkeys(name for cell in own for name in cell.replicas)
            served = [shard for cell in own for shard in cell.shards]
            queue = Queue(arm_id, arm_id)
            known = before.get(queue)
            arm = serving(
                arm_id,
                self._programs[arm_id],
                self.membership.indexes(names),
                len(served) / SHARDS,
                known.group.counters if known else None,
            )
            self._arms[queue] = self._unless_failing(arm)
            for shard in served:
                self._queue_of_shard[shard] = queue
        self._take_over_held(before)

    def _unless_failing(self, arm: ServingArm) -> ServingArm:
        return stand_in(self._baseline, arm) if self.faults.too_many(arm.arm_id) else arm

    def _take_over_held(self, before: Mapping[Queue, ServingArm]) -> None:
        """Let held requests wait on, by the rules of the arm that holds them if it may still decide."""
        flights = self.held.take_all()
        for arm in self._arms.values():
            arm.group.counters[1] = 0.0
        known = {a.arm_id: a for a in reversed([*before.values()]) if a.arm_id in self._standing}
        for flight in flights:
            own = self._queue_of_shard[flight.shard]
            queue = Queue(flight.arm_id, own.host_id)
            host = self._arms[own]
            if queue not in self._arms and (guest := known.get(flight.arm_id)) is not None:
                members, share = host.group.members, host.group.share
                guest = serving(guest.arm_id, guest.program, members, share, guest.group.counters)
                guest.group.counters[1] = 0.0
                self._arms[queue] = self._unless_failing(guest)
            if queue not in self._arms:
                queue, flight.arm_id, flight.window = own, host.arm_id, self.window
            self.held.add(queue, flight)
            self._arms[queue].group.counters[1] += 1.0
