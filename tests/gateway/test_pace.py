"""Slow replicas are told from busy and unlucky ones, whatever arm places the requests. Simulated time."""

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_state import Clock, flight, make, serve

from autopoiesis.arms.seeds import seed_arms
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.pace import TRIAL_EVERY, chance

JUDGED_EVERY_S = 0.25
POSITION = "def score(request, replica, fleet):\n    return "
ARMS = {arm.name: arm.source for arm in seed_arms()}
Service = Callable[[int, float, int], float]
"""Replica, time, requests in flight there → how long it takes [s]."""


class Play:
    """Requests come every 5 ms; one that is answered ends."""

    def __init__(self, source: str, service: Service, replicas: int = 3, stream: bool = False):
        self.clock = Clock()
        self.state = make(replicas, self.clock)
        serve(self.state, source, [f"r{i}" for i in range(replicas)])
        self.service, self.stream = service, stream
        self.told: list[str] = []
        self.under_way: dict[int, Flight] = {}
        self._ends: list[tuple[float, int]] = []
        self._number, self._judged_s = 0, self.clock.now_s

    def run(self, seconds: float) -> Counter[int]:
        """Return how many requests each replica was sent."""
        sent: Counter[int] = Counter()
        until_s = self.clock.now_s + seconds
        pace = self.state.accounts.pace
        while self.clock.now_s < until_s:
            self.clock.now_s += 0.005
            while self._ends and self._ends[0][0] <= self.clock.now_s:
                one = self.under_way.pop(heapq.heappop(self._ends)[1])
                if self.stream:
                    self.state.accounts.first_token(one, -1)
                self.state.accounts.finish(one, -1, 0.0, 16.0, failed=False)
            self._number += 1
            one = replace(flight(self._number, stream=self.stream), arrived_s=self.clock.now_s)
            self.state.decide(one)
            replica = one.replica
            sent[replica] += 1
            self.under_way[self._number] = one
            load = self.state.membership.in_flight(f"r{replica}")
            took_s = self.service(replica, self.clock.now_s, load)
            if math.isfinite(took_s):
                heapq.heappush(self._ends, (self.clock.now_s + took_s, self._number))
            if self.clock.now_s >= self._judged_s + JUDGED_EVERY_S:
                self._judged_s = self.clock.now_s
                self.told += pace.judge(self.under_way.values())
        return sent


def one_is(times: float, since_s: float = 102.0) -> Service:
    return lambda replica, now_s, _: 0.02 * (times if replica == 1 and now_s >= since_s else 1.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arm", ["round-robin", "least-requests", "random"])
def test_a_replica_ten_times_slower_gets_at_most_a_tenth(arm: str, stream: bool):
    play = Play(ARMS[arm], one_is(10.0), stream=stream)
    play.run(2.0)
    assert not play.told
    play.run(2.0)
    after = play.run(10.0)
    assert after[1] / after.total() <= 2.0 / TRIAL_EVERY
    assert any("r1 is slow" in line for line in play.told)


def test_a_frozen_replica_is_found_by_what_waits_there():
    play = Play(ARMS["round-robin"], one_is(math.inf))
    play.run(4.0)
    assert ["replica r1 is slow"] == [line.partition(":")[0] for line in play.told]
    assert not play.run(2.0)[1]  # nothing is tried there while the others still wait


def test_a_replica_that_is_fast_again_gets_its_share():
    play = Play(
        ARMS["round-robin"], lambda r, now_s, _: 0.2 if r == 1 and 102 < now_s < 106 else 0.02
    )
    play.run(10.0)
    assert ["slow", "again"] == [
        "again" if line.endswith("again") else "slow" for line in play.told
    ]
    after = play.run(3.0)
    assert after[1] / after.total() == pytest.approx(1 / 3, abs=0.02)


def test_a_replica_that_is_given_more_than_the_others_is_busy_not_slow():
    spot = (
        POSITION + "abs(replica.position - (1 if fleet.sequence % 4 > 0 else fleet.sequence % 3))\n"
    )
    play = Play(spot, lambda r, _, load: 0.02 * (load if r == 1 else 1.0))
    sent = play.run(10.0)
    assert sent[1] > 2 * sent[0]
    assert not play.told


def test_bad_luck_is_not_slowness():
    rng = np.random.default_rng(1)
    play = Play(ARMS["random"], lambda *_: 0.02 * rng.lognormal(0.0, 1.0))
    play.run(40.0)
    assert not play.told


def test_half_of_the_fleet_at_most_is_slow():
    play = Play(ARMS["least-requests"], lambda r, *_: 0.2 if r else 0.02, replicas=4)
    play.run(10.0)
    assert len(play.state.accounts.pace.slow) <= 2


def test_patience_grows_with_what_a_request_may_write():
    play = Play(ARMS["least-requests"], one_is(1.0))
    pace = play.state.accounts.pace
    assert pace.patience_s(flight(0, stream=False)) is None
    play.run(3.0)
    one = flight(0, stream=False)
    short, long = (pace.patience_s(replace(one, max_output_tokens=n)) for n in (16.0, 4096.0))
    assert short
    assert long
    assert 4.0 * 0.02 < short < 0.2
    assert long > 50 * short


@given(st.integers(1, 8), st.integers(1, 64), st.data())
def test_the_chance_is_that_of_the_exact_test(of: int, of_others: int, data: st.DataObject):
    above = data.draw(st.integers(0, of))
    others = data.draw(st.integers(0, of_others))
    expected = stats.hypergeom.sf(above - 1, of + of_others, above + others, of)
    assert chance(above, of, others, of_others) == pytest.approx(expected, abs=1e-12)
