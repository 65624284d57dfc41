"""A replay in which each human arm behaves as its origin does, by an oracle that knows nothing of arms."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace

PROGRAMS = {arm.name: compile_policy(verify(arm.source)) for arm in seed_arms()}
PROFILE = profile("h100-llama-3-8b-tp1-bf16")
EVEN = (1.0, 1.0, 1.0, 1.0)
BLOCK = 256


def trace(requests: int = 400, rate_rps: float = 40.0, sessions: int = 0, prefixes: int = 0,
          long: float = 0.0, seed: int = 3) -> Trace:  # fmt: skip
    """Poisson arrivals; of them a part `long` with 12,000 tokens; prompts share one of so many prefixes."""
    rng = np.random.default_rng(seed)
    input_tokens = np.where(rng.random(requests) < long, 12_000, rng.integers(400, 1600, requests))
    prefix = rng.integers(1, prefixes + 1, requests) if prefixes else np.zeros(requests, np.int64)
    blocks = input_tokens // BLOCK if prefixes else np.zeros(requests, np.int64)
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1.0 / rate_rps, requests)),
        input_tokens=input_tokens,
        output_tokens=rng.integers(20, 200, requests),
        max_output_tokens=np.full(requests, 4096),
        session=rng.integers(1, sessions + 1, requests) if sessions else np.zeros(requests, np.int64),
        priority=rng.choice([-1.0, 0.0], requests, p=[0.2, 0.8]),
        block_start=np.concatenate([[0], np.cumsum(blocks)]),
        blocks=np.concatenate([k * 1000 + np.arange(n) for k, n in zip(prefix, blocks, strict=True)]),
        block_tokens=BLOCK,
        name="replayed",
    )  # fmt: skip


def replay(name: str, traffic: Trace, speeds: tuple[float, ...] = EVEN) -> Outcome:
    replicas = [ReplicaSpec(f"r{i}", PROFILE, speed) for i, speed in enumerate(speeds)]
    return run_arm(traffic, replicas, PROGRAMS[name], Objective(), 11)


def in_flight(outcome: Outcome, i: int, replicas: int = 4) -> np.ndarray:
    """Requests at each replica when request i was dispatched."""
    at_s = outcome.dispatched_s[i]
    there = (outcome.dispatched_s < at_s) & (outcome.finished_s > at_s)
    return np.bincount(outcome.replica[there], minlength=replicas)


def imbalance(outcome: Outcome) -> float:
    """How many requests the busiest replica has more than the idlest one, mean over arrivals."""
    return float(np.mean([np.ptp(in_flight(outcome, i)) for i in range(len(outcome.replica))]))


def cached_share(outcome: Outcome) -> float:
    return float(outcome.cached_tokens.sum() / outcome.input_tokens.sum())


def test_round_robin_goes_round() -> None:
    assert replay("round-robin", trace()).replica.tolist() == [0, 1, 2, 3] * 100


def test_random_is_uniform_and_without_memory() -> None:
    chosen = replay("random", trace(2000)).replica
    assert np.bincount(chosen).tolist() == pytest.approx([500] * 4, abs=80)
    pairs = np.bincount(4 * chosen[:-1] + chosen[1:], minlength=16)
    assert pairs.tolist() == pytest.approx([125] * 16, abs=45)


def test_least_requests_takes_the_replica_with_fewest_for_its_speed() -> None:
    speeds = np.array([1.0, 2.0, 0.5, 1.0])
    outcome = replay("least-requests", trace(), tuple(speeds))
    for i, chosen in enumerate(outcome.replica):
        load = (in_flight(outcome, i) + 1) / speeds
        assert load[chosen] == load.min()


def test_power_of_two_never_takes_the_busiest_and_lies_between_random_and_least_requests() -> None:
    outcome = replay("power-of-two", trace())
    for i, chosen in enumerate(outcome.replica):
        load = in_flight(outcome, i)
        assert load[chosen] < load.max() or np.count_nonzero(load == load.max()) > 1
    balanced, random = (imbalance(replay(name, trace())) for name in ("least-requests", "random"))
    assert balanced < imbalance(outcome) < random


def test_session_affinity_keeps_a_session_where_it_began_which_is_where_there_was_room() -> None:
    traffic = trace(sessions=40)
    outcome = replay("session-affinity", traffic)
    places = defaultdict(list)
    for i, session in enumerate(traffic.session.tolist()):
        if not places[session]:
            load = in_flight(outcome, i)
            assert load[outcome.replica[i]] == load.min()
        places[session].append(int(outcome.replica[i]))
    assert len(places) == 40
    assert all(len(set(where)) == 1 for where in places.values())
    assert len({where[0] for where in places.values()}) == 4


def test_prefix_affinity_follows_prefixes_and_spreads_one_that_everybody_has() -> None:
    many = trace(rate_rps=20.0, prefixes=40)
    following = replay("prefix-affinity", many)
    assert cached_share(following) > 1.3 * cached_share(replay("round-robin", many))
    one = replay("prefix-affinity", trace(rate_rps=120.0, prefixes=1))
    for i, chosen in enumerate(one.replica):  # the load guard: not all to where the prefix is
        load = in_flight(one, i)
        assert load[chosen] <= 1.5 * load.mean() + 4.0 or load[chosen] == load.min()
    assert np.bincount(one.replica).max() < 0.6 * len(one.replica)
    first = replay("prefix-affinity", trace(20, rate_rps=2.0, prefixes=1)).replica
    assert set(first.tolist()) == {int(first[0])}  # an even load: they stay together


def test_weighted_scorer_weighs_prefixes_against_queues() -> None:
    many = trace(rate_rps=20.0, prefixes=40)
    weighed, round_robin = replay("weighted-scorer", many), replay("round-robin", many)
    assert cached_share(weighed) > 1.3 * cached_share(round_robin)
    apart = trace(rate_rps=60.0)
    assert imbalance(replay("weighted-scorer", apart)) < imbalance(replay("round-robin", apart))
    one = trace(
        rate_rps=120.0, prefixes=1
    )  # 3 for the prefix against 2 for the queue: it herds, in bounds
    assert np.bincount(replay("weighted-scorer", one).replica).max() < 0.5 * len(one)


def test_least_tokens_evens_out_prompts_that_counting_requests_does_not() -> None:
    traffic = trace(rate_rps=25.0, long=0.15)
    waits = {name: float(np.nanmean(replay(name, traffic).ttft_s)) for name in
             ("least-tokens", "least-requests", "round-robin")}  # fmt: skip
    assert waits["least-tokens"] < waits["least-requests"]
    assert waits["least-tokens"] < waits["round-robin"]
    # Beside a long prompt a short one goes elsewhere: behind it, it would be the second to be computed.
    outcome = replay("least-tokens", traffic)
    for i in range(len(traffic)):
        at_s = outcome.dispatched_s[i]
        queued = (outcome.dispatched_s < at_s) & (outcome.first_token_s > at_s)
        work = np.bincount(outcome.replica[queued], outcome.input_tokens[queued], minlength=4)
        assert work[outcome.replica[i]] < 12_000 or work.min() > 2_000


def test_least_predicted_ttft_knows_how_fast_replicas_are() -> None:
    traffic, speeds = trace(rate_rps=30.0, long=0.1), (1.0, 1.0, 0.25, 2.0)
    predicted = replay("least-predicted-ttft", traffic, speeds)
    counts = np.bincount(predicted.replica, minlength=4)
    assert counts[2] < counts[:2].min()
    assert counts[:2].max() < counts[3]
    others = (replay(name, traffic, speeds) for name in ("round-robin", "random"))
    assert all(np.nanmean(predicted.ttft_s) < 0.7 * np.nanmean(o.ttft_s) for o in others)


def test_least_kv_fills_caches_evenly() -> None:
    traffic = trace(rate_rps=30.0, long=0.2)

    def unevenness(name: str) -> float:
        outcome = replay(name, traffic)
        spreads = []
        for at_s in np.arange(1.0, traffic.duration_s, 0.25):
            there = (outcome.dispatched_s < at_s) & (outcome.finished_s > at_s)
            held = np.bincount(outcome.replica[there], outcome.input_tokens[there], minlength=4)
            spreads.append(np.ptp(held))
        return float(np.mean(spreads))

    assert unevenness("least-kv") < 0.9 * unevenness("round-robin")
    assert unevenness("least-kv") < 0.9 * unevenness("random")


def urgency_order(name: str, urgency) -> None:
    """Whenever a held request left, it was the most urgent of those that waited."""
    traffic = trace(300, rate_rps=150.0, long=0.2)
    outcome = replay(name, traffic)
    held = np.flatnonzero(outcome.dispatched_s > outcome.arrival_s)
    assert len(held) > 100
    for i in held.tolist():
        at_s = outcome.dispatched_s[i]
        waiting = np.flatnonzero((outcome.arrival_s < at_s) & (outcome.dispatched_s >= at_s))
        same_moment = outcome.dispatched_s[waiting] == at_s
        values = urgency(traffic, waiting, at_s - outcome.arrival_s[waiting])
        assert values[waiting == i] <= values[~same_moment].min(initial=np.inf) + 1e-9


def test_shortest_prompt_first_lets_the_shortest_go_first_unless_another_has_waited_long() -> None:
    urgency_order(
        "shortest-prompt-first",
        lambda traffic, i, waited_s: traffic.input_tokens[i] - 1000.0 * waited_s,
    )


def test_deadline_slack_lets_go_first_what_is_nearest_to_missing_its_objective() -> None:
    def slack(traffic: Trace, i: np.ndarray, waited_s: np.ndarray) -> np.ndarray:
        slo_s = Objective().slo_ttft_s
        left_s = slo_s - waited_s - traffic.input_tokens[i] / 10_000
        behind = slo_s - left_s  # what misses anyway lets the others go ahead
        return np.where(left_s < 0, behind, left_s) + 60.0 * traffic.priority[i]

    urgency_order("deadline-slack", slack)


def test_shedding_begins_at_saturation_and_spares_what_is_critical() -> None:
    calm, flood = trace(rate_rps=10.0), trace(1500, rate_rps=400.0, long=0.3)
    assert np.all(replay("shed-when-saturated", calm).status == Status.COMPLETED)
    outcome = replay("shed-when-saturated", flood)
    shed = outcome.status == Status.SHED
    assert shed.sum() > 100
    assert np.all(flood.priority[shed] == 0.0)
    admitted = replay("least-tokens", flood)
    assert not np.any(admitted.status == Status.SHED)
    assert np.nanmean(outcome.ttft_s) < np.nanmean(admitted.ttft_s)


def test_every_seed_is_replayed_here() -> None:
    tests = Path(__file__).read_text("utf-8")
    assert all(f'("{name}"' in tests or f'"{name}",\n' in tests for name in PROGRAMS)
