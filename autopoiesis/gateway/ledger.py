"""The requests in flight, and the records that they end in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from autopoiesis.arms.prefix import CHARS_PER_TOKEN
from autopoiesis.gateway.access_log import Ending
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.routes import ANSWERED_WITH_USAGE
from autopoiesis.gateway.state import GatewayState
from autopoiesis.telemetry.records import RequestRecord, Status

LEARNING_WEIGHT = 0.05
"""Weight of a new observation in the learned ratios."""
SHORTEST_TEACHING_CHARACTERS = 256
"""In a shorter prompt the chat template's own tokens count for too much."""
LONGEST_FLIGHT_S = 7200.0
"""After this a request whose end was never told is forgotten."""
MOST_RECENT = 4096


class _Recent:
    """A set of the names added last."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()

    def add(self, name: str) -> None:
        self._names[name] = None
        if len(self._names) > MOST_RECENT:
            self._names.popitem(last=False)

    def take(self, name: str) -> bool:
        """Take a name out; tell whether it was there."""
        there = name in self._names
        self._names.pop(name, None)
        return there


class Ledger:
    """Opens a flight when a request is sent, closes it when the access log tells its end."""

    def __init__(self, state: GatewayState, on_record: Callable[[RequestRecord], None]) -> None:
        self.chars_per_token = float(CHARS_PER_TOKEN)
        self._has_learned = False
        self.bytes_per_token = 240.0
        """Of an answer's stream; about what one chat chunk of one token takes."""
        self._membership, self._accounts, self._clock = (
            state.membership,
            state.accounts,
            state.clock,
        )
        self._on_record = on_record
        self._flights: dict[str, Flight] = {}
        self._keys: dict[str, str] = {}
        """Request id → key of the flight."""
        self._settled = _Recent()
        """Ids of requests that are recorded; the access log need not tell their end."""
        self._passed_over = _Recent()
        """Ids of requests that ended without a decision before it was taken."""

    def __len__(self) -> int:
        return len(self._flights)

    def flights(self) -> list[Flight]:
        """Return the requests in flight."""
        return list(self._flights.values())

    def open(self, flight: Flight) -> None:
        """Await the end of a request that is sent now, unless it has ended already."""
        if self._passed_over.take(flight.request_id):
            self._accounts.retract(flight)
        else:
            self._flights[flight.key] = flight
            self._keys[flight.request_id] = flight.key

    def retract(self, flight: Flight) -> None:
        """Take back a decision that did not reach Envoy."""
        if self._pop(flight.key):
            self._accounts.retract(flight)

    def settle(self, flight: Flight, status: Status, http_status: int) -> None:
        """Record a request that the picker itself ended: shed, refused, or given up while held."""
        self._settled.add(flight.request_id)
        e2e_s = self._clock() - flight.arrived_s
        self._on_record(
            _record(flight, status, http_status, "", 0, 0, False, e2e_s, flight.arrived_unix_s)
        )

    def close(self, ending: Ending) -> None:
        """Take an end into account and record it."""
        if flight := self._pop(ending.key):
            self._close_flight(flight, ending)
        elif ending.key or not self._settled.take(ending.request_id):
            if not ending.key and ending.address:
                self._was_passed_over(ending.request_id)
            self._on_record(self._record_of_stranger(ending))

    def abandon(self, flights: Iterable[Flight]) -> int:
        """Record as aborted those that are still open, Envoy being gone; return how many."""
        still_open = [flight for flight in flights if flight.key in self._flights]
        for flight in still_open:
            self._forget(flight)
        return len(still_open)

    def reconcile(self, replica: str, before_s: float) -> int:
        """Take out of the account what was sent to a replica before then: it has nothing left to do."""
        lost = [
            flight
            for flight in self._flights.values()
            if flight.dispatched_s < before_s
            and self._membership.name_of(flight.replica) == replica
        ]
        for flight in lost:
            self.retract(flight)
        return len(lost)

    def sweep(self) -> None:
        """Forget requests whose end was never told."""
        oldest_s = self._clock() - LONGEST_FLIGHT_S
        for flight in [f for f in self._flights.values() if f.arrived_s < oldest_s]:
            self._forget(flight)

    def _pop(self, key: str) -> Flight | None:
        flight = self._flights.pop(key, None)
        if flight and self._keys.get(flight.request_id) == key:
            del self._keys[flight.request_id]
        return flight

    def _was_passed_over(self, request_id: str) -> None:
        """Envoy did not wait for the decision: it is void if it was taken, and if it comes yet."""
        flight = self._pop(self._keys.get(request_id, ""))
        if flight:
            self._accounts.retract(flight)
        else:
            self._passed_over.add(request_id)

    def _forget(self, flight: Flight) -> None:
        self._pop(flight.key)
        replica = self._membership.name_of(flight.replica)
        e2e_s = self._clock() - flight.arrived_s
        self._on_record(
            _record(flight, Status.ABORTED, 0, replica, 1, 0, False, e2e_s, flight.arrived_unix_s)
        )
        self._accounts.retract(flight)

    def _close_flight(self, flight: Flight, ending: Ending) -> None:
        counted = ending.output_tokens is not None
        output_tokens = (
            ending.output_tokens
            if ending.output_tokens is not None
            else self._estimate(flight, ending)
        )
        self._learn(flight, ending)
        # Envoy's clock starts with the request's first byte, ours when the body is complete.
        upload_s = min(max(flight.arrived_unix_s - ending.started_unix_s, 0.0), ending.ended_s)
        e2e_s = ending.ended_s - upload_s
        if ending.status is not Status.COMPLETED and ending.status is not Status.ABORTED:
            flight.ttft_s = None
        replica = self._membership.at_address(ending.address)
        record = _record(
            flight,
            ending.status,
            ending.http_status,
            self._membership.name_of(
                replica if replica >= 0 else flight.replica if ending.address else -1
            ),
            ending.attempts,
            output_tokens,
            counted,
            e2e_s,
            flight.arrived_unix_s,
            ending.input_tokens,
        )
        failed = ending.status is Status.FAILED
        completed = ending.status is Status.COMPLETED
        self._accounts.finish(
            flight, replica, record.tpot_s or 0.0, output_tokens if completed else 0.0, failed
        )
        self._on_record(record)

    def _estimate(self, flight: Flight, ending: Ending) -> int:
        if ending.status not in {Status.COMPLETED, Status.ABORTED}:
            return 0
        if flight.path not in ANSWERED_WITH_USAGE:
            return 0
        return round(
            ending.body_bytes / (self.bytes_per_token if flight.stream else self.chars_per_token)
        )

    def start_from(self, chars_per_token: float) -> None:
        """Take a tokenizer's word for a sample, as long as no answer has told better."""
        if not self._has_learned:
            self._set_chars_per_token(chars_per_token)

    def _set_chars_per_token(self, ratio: float) -> None:
        self.chars_per_token = min(max(ratio, 0.5), 12.0)
        self._membership.set_chars_per_token(self.chars_per_token)

    def _learn(self, flight: Flight, ending: Ending) -> None:
        if ending.status is not Status.COMPLETED:
            return
        if ending.input_tokens and flight.characters >= SHORTEST_TEACHING_CHARACTERS:
            ratio = min(max(flight.characters / ending.input_tokens, 0.5), 12.0)
            known = self.chars_per_token
            self._has_learned = True
            self._set_chars_per_token(known + LEARNING_WEIGHT * (ratio - known))
        if flight.stream and ending.output_tokens:
            ratio = ending.body_bytes / ending.output_tokens
            self.bytes_per_token += LEARNING_WEIGHT * (ratio - self.bytes_per_token)

    def _record_of_stranger(self, ending: Ending) -> RequestRecord:
        """Record a request on which this process did not decide: the picker was away, or another one."""
        replica = self._membership.at_address(ending.address)
        return RequestRecord(
            id=ending.request_id,
            arrived_s=ending.started_unix_s,
            path=ending.path,
            model="",
            status=ending.status,
            http_status=ending.http_status,
            arm_id=ending.arm_id,
            window=ending.window,
            shard=ending.shard,
            session=0,
            replica=self._membership.name_of(replica),
            attempts=ending.attempts,
            stream=False,
            input_tokens=ending.input_tokens or 0,
            output_tokens=ending.output_tokens or 0,
            max_output_tokens=0,
            cached_tokens=0,
            usage_counted=ending.output_tokens is not None,
            priority_class=0.0,
            held_s=0.0,
            decision_s=0.0,
            ttft_s=None,
            e2e_s=ending.ended_s,
        )


def _record(
    flight: Flight,
    status: Status,
    http_status: int,
    replica: str,
    attempts: int,
    output_tokens: int,
    counted: bool,
    e2e_s: float,
    arrived_s: float,
    input_tokens: int | None = None,
) -> RequestRecord:
    return RequestRecord(
        id=flight.request_id,
        arrived_s=arrived_s,
        path=flight.path,
        model=flight.model,
        status=status,
        http_status=http_status,
        arm_id=flight.arm_id,
        window=flight.window,
        shard=flight.shard,
        session=flight.session,
        replica=replica,
        attempts=attempts,
        stream=flight.stream,
        input_tokens=input_tokens or round(flight.input_tokens),
        output_tokens=output_tokens,
        max_output_tokens=round(flight.max_output_tokens),
        cached_tokens=flight.cached_tokens,
        usage_counted=counted,
        priority_class=flight.priority_class,
        held_s=flight.held_s,
        decision_s=flight.decision_s,
        ttft_s=flight.ttft_s,
        e2e_s=e2e_s,
        blocks=tuple(flight.blocks.tolist()),
    )
