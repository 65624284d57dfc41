"""The account of requests on their way: sent, first token, end."""

import heapq
from collections.abc import Callable

from autopoiesis.arms import fleet
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.membership import Membership
from autopoiesis.gateway.pace import Pace


class Accounts:
    """Keeps each replica's load true to what was sent there. `clock` gives seconds, never going back."""

    def __init__(self, membership: Membership, clock: Callable[[], float]) -> None:
        self.pace = Pace(membership, clock)
        self._fleet = membership.fleet
        self._progress = membership.progress
        self._clock = clock
        self._starting: list[tuple[float, int, Flight]] = []
        self._started = 0

    def send(self, flight: Flight, replica: int) -> None:
        """Account for a request that is sent to a replica."""
        uncached = fleet.dispatch(
            self._fleet, replica, flight.input_tokens, flight.blocks, flight.session
        )
        output = fleet.predicted_output_tokens(self._fleet, flight.max_output_tokens)
        self.sent(flight, replica, uncached, flight.input_tokens + output)

    def sent(
        self, flight: Flight, replica: int, uncached_tokens: float, context_tokens: float
    ) -> None:
        """Note a request that the kernels have accounted for already."""
        flight.replica = replica
        flight.dispatched_s = self._clock()
        flight.uncached_tokens = uncached_tokens
        flight.context_tokens = context_tokens
        self.pace.sent(flight)
        if not flight.stream:
            usual_s = self._fleet.replica[replica, fleet.TTFT] or self._fleet.objective[0]
            self._started += 1
            heapq.heappush(self._starting, (flight.dispatched_s + usual_s, self._started, flight))

    def first_token(self, flight: Flight, replica: int) -> None:
        """Account for the first token, which came from `replica` (-1: from where it was sent)."""
        self._move(flight, replica)
        if flight.replica < 0 or flight.answered:
            return
        now_s = self._clock()
        flight.ttft_s = now_s - flight.arrived_s
        flight.progress_tokens = self._progress.tokens(flight.replica)
        self.pace.first_token(flight, now_s - flight.dispatched_s)
        self._answered(flight, now_s - flight.dispatched_s)

    def assume_first_tokens(self) -> None:
        """Take the first token of plain answers, which nobody sees, to be out when it usually is."""
        now_s = self._clock()
        while self._starting and self._starting[0][0] <= now_s:
            flight = heapq.heappop(self._starting)[2]
            if flight.replica >= 0 and not flight.answered:
                self._answered(flight, self._fleet.replica[flight.replica, fleet.TTFT])

    def finish(
        self, flight: Flight, replica: int, tpot_s: float, output_tokens: float, failed: bool
    ) -> None:
        """Account for the end of a request that was sent (`tpot_s` 0: unknown)."""
        self._move(flight, replica)
        if flight.replica >= 0:
            if output_tokens > 0.0 and not flight.stream:
                self.pace.answered(flight, output_tokens)
            self._end(flight, tpot_s, output_tokens, failed)
        flight.replica = -1

    def retract(self, flight: Flight) -> None:
        """Undo the account of a request that was not sent after all, or whose end nobody knows."""
        self.finish(flight, -1, 0.0, 0.0, failed=False)

    def _answered(self, flight: Flight, ttft_s: float) -> None:
        flight.answered = True
        uncached, context = flight.uncached_tokens, flight.context_tokens
        fleet.first_token(self._fleet, flight.replica, uncached, context, ttft_s)

    def _move(self, flight: Flight, replica: int) -> None:
        """Account for a retry: the request ended up on another replica than it was sent to."""
        if replica in {-1, flight.replica} or flight.replica < 0:
            return
        self._end(flight, 0.0, 0.0, True)
        sent_s = flight.dispatched_s
        flight.answered = False
        flight.moved = True
        self.send(flight, replica)
        flight.dispatched_s = sent_s

    def _end(self, flight: Flight, tpot_s: float, output_tokens: float, failed: bool) -> None:
        fleet.finish(
            self._fleet,
            flight.replica,
            flight.uncached_tokens,
            flight.context_tokens,
            flight.answered,
            tpot_s,
            output_tokens,
            failed,
        )
