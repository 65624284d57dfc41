from dataclasses import replace

import numpy as np
import pytest
from evaluation_scenes import CALM, FLEET, SHIFT, made_trace

from autopoiesis.evaluation.scenario import Segment, capacity_rps, situation_of
from autopoiesis.twin.trace import TraceError


def test_requests_arrive_at_the_asked_share_of_what_the_fleet_serves(traces):
    situation = situation_of(CALM, 0, traces)
    capacity = capacity_rps(made_trace("short", mean_output=20.0), FLEET.replicas())
    rate = len(situation.trace) / situation.trace.duration_s
    assert rate == pytest.approx(0.3 * capacity, rel=0.2)


def test_a_splice_has_its_regimes_one_after_the_other_and_says_when(traces):
    situation = situation_of(SHIFT, 0, traces)
    assert situation.judged_from_s == 10.0
    assert situation.shifts_s == (18.0,)
    trace = situation.trace
    assert np.all(np.diff(trace.arrival_s) >= 0.0)
    assert situation.past.duration_s < 10.0
    late = trace.arrival_s > 18.0
    assert trace.output_tokens[late].mean() > 3 * trace.output_tokens[~late].mean()


def test_each_seed_has_other_requests_and_the_same_seed_the_same(traces):
    one, same, other = (situation_of(SHIFT, seed, traces).trace for seed in (0, 0, 1))
    assert np.array_equal(one.input_tokens, same.input_tokens)
    assert not np.array_equal(one.input_tokens[:50], other.input_tokens[:50])


def test_segments_do_not_overlap_by_a_rounding(traces):
    """A segment is fitted to its length, and its last request must not come after the next one's first."""
    long = replace(CALM.past[0], seconds=100.3)
    scenario = replace(CALM, past=(long,), judged=(replace(long, seconds=47.7),) * 2)
    for seed in range(60):
        situation = situation_of(scenario, seed, traces)
        assert np.all(np.diff(situation.trace.arrival_s) >= 0.0)
        assert situation.trace.arrival_s[-1] <= 100.3 + 2 * 47.7 + 1e-9


def test_less_memory_serves_less():
    trace = made_trace("long", mean_output=200.0)
    whole, little = (
        capacity_rps(trace, type(FLEET)(FLEET.profile, (1.0,), share).replicas())
        for share in (1.0, 0.02)
    )
    assert little < 0.8 * whole


def test_lengths_can_be_scaled_down(traces):
    short = replace(CALM, past=())
    small = replace(short, judged=tuple(replace(s, lengths=0.25) for s in CALM.judged))
    whole, scaled = (situation_of(scenario, 0, traces).trace for scenario in (short, small))
    n = len(whole)
    assert len(scaled) > n  # they are served sooner, so the same load has more of them
    assert np.array_equal(scaled.input_tokens[:n], np.rint(whole.input_tokens / 4).clip(1))
    assert np.array_equal(scaled.output_tokens[:n], np.rint(whole.output_tokens / 4).clip(1))


def test_a_trace_too_short_for_what_is_asked_is_refused(traces):
    long = type(SHIFT)("x", (Segment("short", 0.9, 1000.0),), SHIFT.judged, FLEET)
    with pytest.raises(TraceError, match=r"short: has .* are needed"):
        situation_of(long, 0, traces)
