"""Accounting, features and decisions of the fleet kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from lent import hit_tokens

from autopoiesis.arms import features as f
from autopoiesis.arms import fleet as k
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective

NO_BLOCKS = np.zeros(0, np.int64)


def fleet(replicas=3, blocks=8):
    state = k.fleet_state(replicas, Objective(0.8, 0.08), prefix_slots=8, block_tokens=16)
    for r in range(replicas):
        k.join(state, r, 1.0, blocks, 0.0)
    return state


def program(score="replica.position", **others):
    parts = [f"def score(request, replica, fleet):\n    return {score}"]
    for name, value in others.items():
        parts.append(f"def {name}({', '.join(f.FUNCTIONS[name])}):\n    return {value}")
    return compile_policy(verify("\n".join(parts)))


def placed(p, state, group, blocks=NO_BLOCKS, session=0, now_s=0.0, tokens=100.0, draw=0.5):
    registers = p.registers.copy()
    k.describe_request(registers, state, tokens, 50.0, 0.0, 0.0)
    k.describe_fleet(registers, state, group, now_s, draw)
    order = np.full(len(group.members), -7, np.int64)
    count = k.place(p, registers, state, group, blocks, session, now_s, order)
    return order[:count].tolist()


# --- accounting


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(1, 4000)), max_size=80))
def test_load_counts_what_is_outstanding_and_returns_to_zero(steps):
    state = fleet()
    flying = []  # [replica, uncached, context, answered]
    for action, r, tokens in steps:
        if action < 5 or not flying:
            blocks = np.arange(tokens // 16 % 9, dtype=np.int64) + tokens % 2 * 100
            expected = hit_tokens(state, r, blocks, float(tokens))
            uncached = k.dispatch(state, r, float(tokens), blocks, 0)
            assert uncached == tokens - expected
            assert uncached >= 1
            flying.append([r, uncached, tokens + 20.0, False])
        elif action < 8:
            flight = flying[tokens % len(flying)]
            if not flight[3]:
                flight[3] = True
                k.first_token(state, flight[0], flight[1], flight[2], 0.2)
        else:
            ended, uncached, context, answered = flying.pop(tokens % len(flying))
            k.finish(state, ended, uncached, context, answered, 0.0, 10.0, not answered)
        for i in range(3):
            here = [flight for flight in flying if flight[0] == i]
            row = state.replica[i]
            assert row[k.IN_FLIGHT] == len(here)
            assert row[k.QUEUED_PREFILL] == sum(u for _, u, _, answered in here if not answered)
            assert row[k.DECODING] == sum(c for _, _, c, answered in here if answered)


def test_latency_and_error_averages():
    state = fleet()
    for ttft, tpot in [(1.0, 0.1), (2.0, 0.2)]:
        k.dispatch(state, 0, 10.0, NO_BLOCKS, 0)
        k.first_token(state, 0, 10.0, 20.0, ttft)
        k.finish(state, 0, 10.0, 20.0, True, tpot, 5.0, False)
    row = state.replica[0]
    assert row[k.TTFT] == pytest.approx(1.1)
    assert row[k.TPOT] == pytest.approx(0.11)
    assert row[k.ERROR_RATE] == 0.0
    for _ in range(100):
        k.dispatch(state, 0, 10.0, NO_BLOCKS, 0)
        k.finish(state, 0, 10.0, 20.0, False, 0.0, 0.0, True)
    assert row[k.ERROR_RATE] == pytest.approx(1.0, abs=1e-4)
    assert row[k.TPOT] == pytest.approx(0.11)
    assert (state.replica[1:, k.ERROR_RATE] == 0).all()


def test_output_prediction_follows_what_is_seen_and_the_client_limit():
    state = fleet()
    assert k.predicted_output_tokens(state, 1000.0) == k.DEFAULT_OUTPUT_TOKENS
    for _ in range(500):
        k.dispatch(state, 0, 10.0, NO_BLOCKS, 0)
        k.finish(state, 0, 10.0, 20.0, True, 0.1, 400.0, False)
    assert k.predicted_output_tokens(state, 1000.0) == pytest.approx(400.0, rel=1e-3)
    assert k.predicted_output_tokens(state, 100.0) == 100.0


@pytest.mark.parametrize(("kind", "burstiness"), [("even", 0.0), ("poisson", 1.0), ("bursty", 2.0)])
def test_arrival_rate_and_burstiness(kind, burstiness):
    rng = np.random.default_rng(11)
    gap = {
        "even": lambda: 0.1,
        "poisson": lambda: rng.exponential(0.1),
        "bursty": lambda: rng.gamma(0.25, 0.4),
    }[kind]
    state, p = fleet(), program()
    rates, variations, now = [], [], 0.0
    for i in range(3000):
        now += gap()
        k.arrive(state, 500.0, now)
        if i >= 200:
            registers = p.registers.copy()
            k.describe_fleet(registers, state, k.group_of(np.arange(3), 0.5), now, 0.0)
            fields = f.Fleet(*registers[f.FIRST_FLEET : f.FIRST_CONSTANT])
            rates.append(fields.arrival_rate_rps)
            variations.append(fields.arrival_burstiness)
            assert fields.input_tokens_mean == pytest.approx(500.0)
    assert np.median(rates) == pytest.approx(5.0, rel=0.2)
    assert np.mean(variations) == pytest.approx(burstiness, abs=0.25)


def test_arrival_rate_falls_when_nothing_comes():
    state, p = fleet(), program()
    for i in range(200):
        k.arrive(state, 1.0, i * 0.1)
    registers = p.registers.copy()
    k.describe_fleet(registers, state, k.group_of(np.arange(3), 1.0), 19.9 + 1000.0, 0.0)
    assert registers[f.FIRST_FLEET + 3] < 0.1


# --- features


def test_every_feature_stands_under_its_name():
    state = fleet(4)
    state.replica[1] = [3, 70, 900, 2, 1, 0.4, 0, 0, 0.3, 0.03, 0.1, 1.5, 0, 0, 0]
    state.replica[2, k.IN_FLIGHT], state.replica[2, k.KV_USAGE] = 5, 0.2
    state.joined_s[1] = 40.0
    for i in range(20):
        k.arrive(state, 300.0, 2.0 * i)
    blocks = np.array([11, 12, 13], np.int64)
    k.dispatch(state, 1, 48.0, blocks, 99)
    state.replica[1, k.IN_FLIGHT], state.replica[1, k.QUEUED_PREFILL] = 3, 70
    group = k.group_of(np.array([2, 1]), 0.5)
    group.counters[:] = [17, 6]

    names = {
        parameter: [f"{parameter}.{field}" for field in declared._fields]
        for parameter, (declared, _) in f.INPUTS.items()
    }
    expected = {
        "request": [100.0, 50.0, 50.0, 0.0, 0.0, 0.8],
        "replica": [3, 70, 900, 2, 1, 0.4, 48, 1, 0.3, 0.03, 0.1, 1.5, 60.0, 0, 1],
        "fleet": [2, 8, 6, 0.5 / 2.0, 0, 300, 0.3, 0.02 * 0.0, 0.8, 0.08, 0.5, 17],
    }
    for parameter, values in expected.items():
        for name, value in zip(names[parameter], values, strict=True):
            # The replica whose field has this value scores lowest of the two.
            p = program(f"abs({name} - {value!r}) if replica.position > 0.0 else 1e-9")
            order = placed(p, state, group, blocks, 99, now_s=100.0)
            group.counters[0] = 17
            if name == "fleet.arrival_rate_rps":
                continue  # depends on the silence since the last arrival; tested above
            assert order == [1, 2], name


def test_a_waiting_request_loses_slack():
    state, p = fleet(), program()
    registers = p.registers.copy()
    k.describe_request(registers, state, 10.0, 20.0, -1.0, 1.3)
    request = f.Request(*registers[: f.N_REQUEST])
    assert request == (10.0, 20.0, 20.0, -1.0, 1.3, pytest.approx(-0.5))


def test_prefix_hits_leave_one_token_to_compute():
    state = fleet()
    blocks = np.array([1, 2], np.int64)
    assert k.dispatch(state, 0, 32.0, blocks, 0) == 32.0
    assert hit_tokens(state, 0, blocks, 32.0) == 31.0
    assert hit_tokens(state, 0, blocks, 40.0) == 32.0
    assert hit_tokens(state, 0, np.array([9, 2], np.int64), 40.0) == 0.0
    assert hit_tokens(state, 1, blocks, 40.0) == 0.0
    k.join(state, 0, 1.0, 8, 5.0)
    assert hit_tokens(state, 0, blocks, 40.0) == 0.0


def test_sessions_are_found_where_they_were_served_last():
    state, group = fleet(), k.group_of(np.arange(3), 1.0)
    p = program("-replica.session_here")
    assert placed(p, state, group, session=5) == [0, 1, 2]
    k.dispatch(state, 2, 10.0, NO_BLOCKS, 5)
    assert placed(p, state, group, session=5) == [2, 0, 1]
    assert placed(p, state, group, session=5 + k.SESSIONS) == [0, 1, 2]  # same slot, other session
    assert placed(p, state, group, session=0) == [0, 1, 2]
    k.dispatch(state, 1, 10.0, NO_BLOCKS, 5)
    assert placed(p, state, group, session=5) == [1, 0, 2]
    k.dispatch(state, 2, 10.0, NO_BLOCKS, -5)
    assert placed(p, state, group, session=-5) == [2, 0, 1]


# --- decisions


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=9)
)
def test_place_is_a_stable_sort_with_the_best_free_replica_first(rows):
    """Rows: score, in flight, draining; the ceiling is 2."""
    state = fleet(len(rows))
    for r, (score, in_flight, draining) in enumerate(rows):
        state.replica[r, k.KV_USAGE] = score
        state.replica[r, k.IN_FLIGHT] = in_flight
        state.replica[r, k.DRAINING] = draining
    group = k.group_of(np.arange(len(rows)), 1.0)
    usable = [r for r, row in enumerate(rows) if not row[2]]
    by_score = sorted(usable, key=lambda r: rows[r][0])
    assert placed(program("replica.kv_usage"), state, group) == by_score
    free = [r for r in by_score if rows[r][1] < 2]
    expected = [free[0], *[r for r in by_score if r != free[0]]] if free else []
    before = group.counters[0]
    assert placed(program("replica.kv_usage", ceiling="2"), state, group) == expected
    assert group.counters[0] == before + bool(free)


def test_place_covers_only_the_group():
    state = fleet(4)
    assert placed(program("-replica.position"), state, k.group_of(np.array([3, 0]), 0.5)) == [0, 3]
    assert placed(program(), state, k.group_of(np.zeros(0, np.int64), 0.0)) == []


def test_a_replica_that_never_joined_gets_nothing():
    state = k.fleet_state(2, Objective(), 4, 16)
    group = k.group_of(np.arange(2), 1.0)
    assert placed(program(), state, group) == []
    k.join(state, 1, 1.0, 4, 0.0)
    assert placed(program(), state, group) == [1]


def test_admission_and_urgency():
    state = fleet()
    registers = program().registers.copy()
    k.describe_request(registers, state, 10.0, 20.0, 0.0, 2.5)
    assert k.admits(program(), registers)
    assert k.urgency(program(), registers) == -2.5
    for value, admitted in [("1", True), ("0", False), ("-1", False), ("1e-300", True)]:
        p = program(admit=value, priority="request.input_tokens")
        registers = p.registers.copy()
        k.describe_request(registers, state, 10.0, 20.0, 0.0, 2.5)
        assert k.admits(p, registers) == admitted
        assert k.urgency(p, registers) == 10.0


# --- compiled or not


def test_kernels_mean_the_same_without_compilation():
    script = Path(__file__).with_name("fleet_scenario.py")

    def decided(**environment):
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", script],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    compiled, plain = decided(), decided(NUMBA_DISABLE_JIT="1")
    assert compiled.keys() == plain.keys()
    assert len(compiled) > 10
    for name, (log, *numbers) in compiled.items():
        assert [entry[2] for entry in log] == [entry[2] for entry in plain[name][0]], name
        assert len({tuple(entry[2]) for entry in log}) > 1, name
        flat = [np.array(entry[:2], float) for entry in log]
        np.testing.assert_allclose(flat, [np.array(entry[:2], float) for entry in plain[name][0]])
        for found, expected in zip(numbers, plain[name][1:], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
