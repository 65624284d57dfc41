"""A plain fleet that steps token by token: engines of `reference`, and a gateway in ordinary Python.

The gateway places each request where the fewest are in flight, below a ceiling, and holds the rest
in order of arrival. It shares no code with the twin.
"""

import math
from dataclasses import dataclass, field

from reference import ReferenceEngine, Sequence

from autopoiesis.twin.capacity import Action, CapacityChange, ReplicaSpec

SCRAPE_S = 0.5
HELD_LIMIT_S = 60.0

Arrival = tuple[float, int, int, list[int], float]


@dataclass
class Request:
    number: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    hashes: list[int]
    priority: float
    status: str = "pending"
    replica: int = -1
    first_token_s: float = math.nan
    finished_s: float = math.nan
    cached: int = 0


@dataclass
class Replica:
    spec: ReplicaSpec
    engine: ReferenceEngine
    state: str = "off"
    ends_s: float = math.inf
    in_flight: int = 0
    stepping: bool = False
    leaving: list[int] = field(default_factory=list)
    then: tuple[str, float, ReplicaSpec | None] = ("off", 0.0, None)
    since_s: float | None = None

    @property
    def busy(self) -> bool:
        return bool(self.engine.running or self.engine.waiting)


class ReferenceFleet:
    def __init__(
        self,
        specs: list[ReplicaSpec],
        present: list[bool],
        entry_tokens: int,
        arrivals: list[Arrival],
        ceiling: float,
        patience_s: float,
    ) -> None:
        self.entry_tokens = entry_tokens
        self.replicas = [Replica(s, ReferenceEngine(s.profile, entry_tokens)) for s in specs]
        self.requests = [Request(i, *arrival) for i, arrival in enumerate(arrivals)]
        self.ceiling = ceiling
        self.patience_s = patience_s
        self.held: list[Request] = []
        self.now_s = 0.0
        self.arrived = self.left = self.scrapes = 0
        self.spent_s = 0.0
        for replica, there in zip(self.replicas, present, strict=True):
            if there:
                replica.since_s = 0.0
                self.make_ready(replica)

    # --- time -----------------------------------------------------------------------------------

    def advance(self, until_s: float) -> None:
        while True:
            replica = min(self.replicas, key=lambda r: r.ends_s)
            arrival_s = self.time_of(self.arrived, len(self.requests), 0.0)
            leave_s = self.time_of(self.left, self.arrived, self.patience_s)
            next_s = min(replica.ends_s, arrival_s, leave_s)
            scrape_s = self.scrapes * SCRAPE_S
            if next_s == math.inf == until_s and not self.held:
                return
            if scrape_s <= min(next_s, until_s):
                self.now_s = scrape_s
                self.scrapes += 1
                self.scrape()
            elif next_s > until_s:
                self.now_s = until_s
                return
            elif arrival_s == next_s:
                self.now_s = arrival_s
                self.arrived += 1
                self.place_or_hold(self.requests[self.arrived - 1])
            elif leave_s == next_s:
                self.now_s = leave_s
                self.left += 1
                self.give_up(self.requests[self.left - 1])
            else:
                self.now_s = replica.ends_s
                self.end_step(replica)

    def time_of(self, index: int, end: int, later_s: float) -> float:
        return self.requests[index].arrival_s + later_s if index < end else math.inf

    def scrape(self) -> None:
        for request in [q for q in self.held if self.now_s - q.arrival_s > HELD_LIMIT_S]:
            self.held.remove(request)
            request.status = "shed"
        if not any(r.busy for r in self.replicas):
            self.release()

    # --- requests -------------------------------------------------------------------------------

    def place_or_hold(self, request: Request) -> None:
        if self.held or not self.place(request):
            self.held.append(request)

    def place(self, request: Request) -> bool:
        free = [r for r in self.replicas if r.state == "ready" and r.in_flight < self.ceiling]
        if not free:
            return False
        replica = min(free, key=lambda r: r.in_flight)
        request.replica = self.replicas.index(replica)
        if not replica.engine.fits(request.input_tokens, request.output_tokens):
            request.status, request.finished_s = "failed", self.now_s
            return True
        replica.in_flight += 1
        replica.engine.submit(
            request.number,
            request.input_tokens,
            request.output_tokens,
            request.hashes,
            request.priority,
        )
        if not replica.stepping:
            replica.ends_s = self.now_s
        return True

    def release(self) -> None:
        while self.held and self.place(self.held[0]):
            self.held.pop(0)

    def give_up(self, request: Request) -> None:
        if request.status != "pending" or not math.isnan(request.first_token_s):
            return
        request.status, request.finished_s = "aborted", self.now_s
        if request.replica < 0:
            self.held.remove(request)
            return
        replica = self.replicas[request.replica]
        replica.in_flight -= 1
        if any(s.name == request.number for s in replica.engine.waiting):
            replica.engine.abort(request.number)
        else:
            replica.leaving.append(request.number)

    def end_step(self, replica: Replica) -> None:
        if replica.state == "starting":
            self.make_ready(replica)
            return
        moved = self.account(replica) if replica.stepping else False
        if replica.leaving:
            moved = True
            for number in replica.leaving:
                replica.engine.abort(number)
            replica.leaving.clear()
        if moved:
            replica.stepping = False
            self.release()
        duration_s = replica.engine.start_step()
        replica.stepping = duration_s is not None
        replica.ends_s = (
            math.inf if duration_s is None else self.now_s + duration_s / replica.spec.speed
        )
        if replica.state == "draining" and not replica.busy:
            self.drained(replica)

    def account(self, replica: Replica) -> bool:
        moved = False
        for sequence, first, last in replica.engine.finish_step():
            request = self.requests[sequence.name]
            if request.status == "aborted":
                continue
            moved = moved or first or last
            if first:
                request.first_token_s = self.now_s
            if last:
                replica.in_flight -= 1
                request.status, request.finished_s = "completed", self.now_s
                request.cached = cached_of(sequence)
        return moved

    # --- capacity -------------------------------------------------------------------------------

    def change(self, change: CapacityChange) -> None:
        """Carry it out if the replica's state allows it; ValueError otherwise."""
        replica = self.replicas[change.replica]
        allowed = {
            Action.START: {"off"},
            Action.WAKE: {"asleep"},
            Action.SLEEP: {"ready", "draining"},
            Action.RELOAD: {"ready", "draining"},
        }
        if replica.state not in allowed.get(change.action, {replica.state}):
            raise ValueError
        if replica.state == "off" and change.action is not Action.START:
            return
        if change.action is Action.START:
            replica.since_s = self.now_s
        if change.action in (Action.START, Action.WAKE):
            self.start(replica, change.duration_s, change.spec)
        elif change.action is Action.LOSE:
            self.lose(replica)
        else:
            after = {Action.DRAIN: "off", Action.SLEEP: "asleep", Action.RELOAD: "starting"}
            replica.then = (after[change.action], change.duration_s, change.spec)
            ready = replica.state in ("ready", "draining")
            replica.state = "draining"
            if not (ready and replica.busy):
                self.drained(replica)

    def start(self, replica: Replica, duration_s: float, spec: ReplicaSpec | None) -> None:
        replica.spec = spec or replica.spec
        replica.engine = ReferenceEngine(replica.spec.profile, self.entry_tokens)
        replica.state, replica.ends_s = "starting", self.now_s + duration_s
        if duration_s == 0.0:
            self.make_ready(replica)

    def make_ready(self, replica: Replica) -> None:
        replica.state, replica.ends_s = "ready", math.inf
        self.release()

    def drained(self, replica: Replica) -> None:
        state, duration_s, spec = replica.then
        self.empty(replica, state)
        if state == "starting":
            self.start(replica, duration_s, spec)

    def lose(self, replica: Replica) -> None:
        number = self.replicas.index(replica)
        here = [q for q in self.requests if q.replica == number and q.status == "pending"]
        self.empty(replica, "off")
        for request in here:
            if not math.isnan(request.first_token_s):
                request.status, request.finished_s = "failed", self.now_s
        for request in here:
            if request.status == "pending":
                request.replica = -1
                self.place_or_hold(request)

    def empty(self, replica: Replica, state: str) -> None:
        replica.engine = ReferenceEngine(replica.spec.profile, self.entry_tokens)
        replica.state, replica.ends_s, replica.in_flight = state, math.inf, 0
        replica.stepping = False
        replica.leaving.clear()
        if state == "off" and replica.since_s is not None:
            self.spent_s += self.now_s - replica.since_s
            replica.since_s = None

    def replica_seconds(self) -> float:
        return self.spent_s + sum(
            self.now_s - r.since_s for r in self.replicas if r.since_s is not None
        )


def cached_of(sequence: Sequence) -> int:
    return sequence.cached or 0
