"""How fast each replica works: finds those that are far slower than the others, whatever arm serves.

A request's pace is its time per token of work, so that long and short ones compare. A replica is
slow if its newest requests took a multiple of what is typical for the others, more of them than
chance allows, though it was asked to do no more than they. Requests that wait already longer than
that count too, so a frozen replica is found without waiting for it. A slow replica rests: it gets a
request now and then, on trial, until those are as fast as elsewhere.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.membership import MOST_REPLICAS, Membership

log = logging.getLogger(__name__)

SLOW = 4.0
"""Times the others' pace from which a replica may be slow ..."""
CHANCE = 1e-6
"""... if one that is like the others would show it less often than this."""
BACK = 2.0
"""Times the others' pace that requests on trial must stay below ..."""
TRIALS = 3
"""... so many in a row."""
TRIAL_EVERY = 20
"""Of the fleet's requests, one in so many at most is a trial."""
NEWEST, REMEMBERED, FEWEST = 8, 32, 3
"""Requests by which a replica is judged, those kept for comparison, and the fewest that say something."""
RECENT_S = 30.0
"""Older requests say nothing of now."""
MOST_ASKED = 1.5
"""Times the work of the busiest other from which a replica is taken to be loaded, not slow."""
FADING = 0.98
"""What a judgement leaves of the work that was asked before; they come a few times a second."""
REQUEST_TOKENS, STEP_TOKENS = 256.0, 64.0
"""What a request, and a token that is written, cost beside a token that is read [tokens]."""
FIRST, WHOLE = 0, 1
"""Kinds of pace: until the first token of a stream, and of an answer in one piece."""
PATIENCE = 4.0
"""Times the typical pace for which a request that writes all it may is waited for."""

Paces = Sequence[tuple[float, float]]
"""When each request was sent [s], and its pace by what is typical for its kind."""


def reading(tokens: float) -> float:
    """Return the work until the first token [tokens]."""
    return REQUEST_TOKENS + tokens


def answering(tokens: float, output_tokens: float) -> float:
    """Return the work of a whole answer [tokens]."""
    return reading(tokens) + STEP_TOKENS * output_tokens


def chance(above: int, of: int, others_above: int, of_others: int) -> float:
    """Return how probable it is that so many or more lie above a limit if all are of one kind.

    Fisher's exact test, one-sided.
    """
    everything, all_above = of + of_others, above + others_above
    ways = sum(
        math.comb(all_above, k) * math.comb(everything - all_above, of - k)
        for k in range(above, min(of, all_above) + 1)
    )
    return ways / math.comb(everything, of)


class Pace:
    """Judges the replicas in `membership`. `clock` gives seconds, never going back."""

    def __init__(self, membership: Membership, clock: Callable[[], float]) -> None:
        self._membership = membership
        self._clock = clock
        self._seen: list[deque[tuple[float, int, float]]] = [
            deque(maxlen=REMEMBERED) for _ in range(MOST_REPLICAS)
        ]
        """By replica: when a request was sent, kind, pace [s per token]."""
        self._asked = [0.0] * MOST_REPLICAS
        """Work sent to each replica, the older the less [tokens]."""
        self._typical: dict[int, float] = {}
        self._trials: dict[int, deque[bool]] = {}
        """Slow replica → whether each of its last trials was fast enough."""
        self._since_trial = 0

    @property
    def slow(self) -> frozenset[int]:
        """Replicas that are slow."""
        return frozenset(self._trials)

    def sent(self, flight: Flight) -> None:
        """Note that a request was sent."""
        self._asked[flight.replica] += flight.context_tokens
        self._since_trial += 1
        if flight.replica in self._trials:
            self._since_trial = 0
            self._membership.set_resting(flight.replica, True)

    def first_token(self, flight: Flight, took_s: float) -> None:
        """Note how long the first token of a stream took since the request was sent."""
        self._took(flight, FIRST, took_s / reading(flight.uncached_tokens))

    def answered(self, flight: Flight, output_tokens: float) -> None:
        """Note that an answer in one piece is complete now."""
        took_s = self._clock() - flight.dispatched_s
        self._took(flight, WHOLE, took_s / answering(flight.uncached_tokens, output_tokens))

    def patience_s(self, flight: Flight) -> float | None:
        """Return for how long a request may show nothing before something is wrong; None: unknown."""
        typical = self._typical.get(FIRST if flight.stream else WHOLE)
        if typical is None:
            return None
        if flight.stream:
            return 2.0 * PATIENCE * typical * reading(flight.input_tokens)
        return PATIENCE * typical * answering(flight.input_tokens, flight.max_output_tokens)

    def judge(self, under_way: Iterable[Flight]) -> list[str]:
        """Find who is slow and who is no more; return what an operator should know."""
        replicas = self._membership.indexes().tolist()
        self._asked = [FADING * work for work in self._asked]
        for gone in self._trials.keys() - set(replicas):
            del self._trials[gone]
        seen = self._recent(replicas)
        waiting = self._waiting(under_way)
        medians = {r: median(p for _, p in seen[r]) for r in replicas if len(seen[r]) >= FEWEST}
        told: list[str] = []
        for r in replicas:
            elsewhere = [pace for other, pace in medians.items() if other != r]
            if not elsewhere:
                continue
            typical = median(elsewhere)
            if r in self._trials:
                if self._is_back(r):
                    told.append(self._let_back(r))
            elif self._is_slow(r, typical, seen, waiting) and self._may_rest(replicas):
                told.append(self._set_aside(r))
        self._give_trials()
        return told

    # --- inside -------------------------------------------------------------------------------

    def _took(self, flight: Flight, kind: int, pace_s: float) -> None:
        if flight.moved:  # its time is in part another replica's
            return
        self._seen[flight.replica].append((flight.dispatched_s, kind, pace_s))
        trials = self._trials.get(flight.replica)
        typical = self._typical.get(kind)
        if trials is not None and typical is not None:
            trials.append(pace_s < BACK * typical)

    def _recent(self, replicas: Sequence[int]) -> dict[int, Paces]:
        """Return what was seen lately, and find what is typical of each kind for replicas that do not rest."""
        oldest_s = self._clock() - RECENT_S
        recent = {r: [one for one in self._seen[r] if one[0] >= oldest_s] for r in replicas}
        usual = [one for r, found in recent.items() if r not in self._trials for one in found]
        for kind in (FIRST, WHOLE):
            if paces := [pace_s for _, its, pace_s in usual if its == kind]:
                self._typical[kind] = max(median(paces), 1e-9)
        return {
            r: [
                (sent_s, pace_s / self._typical.get(kind, pace_s)) for sent_s, kind, pace_s in found
            ]
            for r, found in recent.items()
        }

    def _waiting(self, under_way: Iterable[Flight]) -> Mapping[int, Paces]:
        """Return the least that the paces of unanswered requests can still become."""
        now_s = self._clock()
        waiting: dict[int, list[tuple[float, float]]] = {}
        for flight in under_way:
            kind = FIRST if flight.stream else WHOLE
            if flight.ttft_s is not None or flight.moved or kind not in self._typical:
                continue
            tokens = flight.uncached_tokens
            work = reading(tokens) if flight.stream else answering(tokens, flight.max_output_tokens)
            pace = (now_s - flight.dispatched_s) / work / self._typical[kind]
            waiting.setdefault(flight.replica, []).append((flight.dispatched_s, pace))
        return waiting

    def _is_slow(
        self, r: int, typical: float, seen: Mapping[int, Paces], waiting: Mapping[int, Paces]
    ) -> bool:
        limit = SLOW * typical

        def known(replica: int) -> list[tuple[float, float]]:
            overdue = [one for one in waiting.get(replica, ()) if one[1] > limit]
            return [*seen[replica], *overdue]

        own = [pace > limit for _, pace in sorted(known(r))[-NEWEST:]]
        if 2 * sum(own) <= len(own):
            return False
        others = [pace > limit for other in seen if other != r for _, pace in known(other)]
        if chance(sum(own), len(own), sum(others), len(others)) >= CHANCE:
            return False
        return self._asked[r] <= MOST_ASKED * max(
            self._asked[other] for other in seen if other != r
        )

    def _may_rest(self, replicas: Sequence[int]) -> bool:
        """What most replicas do is what is typical, so at most half of them are slow."""
        return 2 * (len(self._trials) + 1) <= len(replicas)

    def _is_back(self, r: int) -> bool:
        trials = self._trials[r]
        return len(trials) == TRIALS and all(trials)

    def _set_aside(self, r: int) -> str:
        self._trials[r] = deque(maxlen=TRIALS)
        self._membership.set_resting(r, True)
        name = self._membership.name_of(r)
        log.warning("Replica %s is slow", name)
        return (
            f"replica {name} is slow: its requests take more than {SLOW:g} times as long as the "
            f"others'; it gets one in {TRIAL_EVERY} at most until they do not"
        )

    def _let_back(self, r: int) -> str:
        del self._trials[r]
        self._seen[r].clear()
        self._membership.set_resting(r, False)
        name = self._membership.name_of(r)
        log.warning("Replica %s is as fast as the others again", name)
        return f"replica {name} is as fast as the others again"

    def _give_trials(self) -> None:
        """Let one slow replica that has nothing to do be chosen once."""
        if self._since_trial < TRIAL_EVERY:
            return
        for r in self._trials:
            if self._membership.in_flight(self._membership.name_of(r)) == 0:
                self._membership.set_resting(r, False)
                return
