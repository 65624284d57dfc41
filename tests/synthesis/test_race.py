"""Comparison is paired, intervals are honest, futures vary what they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthesis_scenes import RANDOM, ROUND_ROBIN, idle_brief, uneven_brief

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.synthesis.probe import Probe
from autopoiesis.synthesis.race import (
    CONFIDENCE,
    SURGE_WINDOWS,
    SURGES,
    Course,
    OutOfTime,
    future_cells,
    holdout_cells,
    mean_utility,
    paired_gain,
    race_cells,
    screen_cell,
    window_cells,
)
from autopoiesis.twin.simulation import run_arm


def program(source: str):
    return compile_policy(verify(source))


@given(st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=20, unique=True))
@settings(max_examples=50, deadline=None)
def test_the_interval_is_students_t_over_windows(differences):
    gain = paired_gain(differences, range(len(differences)))
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    assert gain.mean == pytest.approx(np.mean(differences))
    assert (gain.low, gain.high) == pytest.approx((low, high), abs=1e-12)


def test_repeats_of_one_window_do_not_narrow_the_interval():
    once = paired_gain([0.1, 0.2, 0.3], [0, 1, 2])
    assert paired_gain([0.1, 0.2, 0.3] * 5, [0, 1, 2] * 5) == once
    assert paired_gain([0.1] * 9, [0] * 9).low == -np.inf


def test_a_policy_runs_once_per_cell_and_only_in_time():
    brief = idle_brief()
    cells = race_cells(brief)
    allowed = iter([None, None])

    def in_time():
        if next(allowed, "late") == "late":
            raise OutOfTime

    course = Course(brief.replicas, brief.objective, in_time)
    run = program(ROUND_ROBIN)
    first = course.utility("a", run, cells[0])
    assert course.utility("a", run, cells[0]) == first
    assert course.replays == 1
    course.utility("a", run, cells[1])
    with pytest.raises(OutOfTime):
        course.utility("a", run, cells[2])


def test_refused_requests_have_no_utility_and_the_warm_up_does_not_count():
    brief = idle_brief()
    nothing = program(
        "def score(request, replica, fleet):\n    return 0.0\ndef admit(request, fleet):\n    return 0.0"
    )
    trace = brief.windows[0]
    everything = np.ones(len(trace), bool)
    refused = run_arm(trace, brief.replicas, nothing, brief.objective, 0)
    served = run_arm(trace, brief.replicas, program(ROUND_ROBIN), brief.objective, 0)
    assert mean_utility(refused, brief.objective, everything) == 0.0
    assert mean_utility(served, brief.objective, everything) > 0.99
    stuck = served._replace(
        first_token_s=np.where(np.arange(len(trace)) == 0, np.inf, served.first_token_s)
    )
    assert mean_utility(stuck, brief.objective, everything) < 1.0
    assert mean_utility(stuck, brief.objective, np.arange(len(trace)) > 0) > 0.99


def test_cells_keep_raced_and_held_out_windows_apart():
    brief = uneven_brief()
    raced, held, futures = race_cells(brief), holdout_cells(brief), future_cells(brief)
    recent = set(range(len(brief.windows)))
    surges = {c.window for c in raced} - recent
    assert recent < {c.window for c in raced}
    assert len(surges) == len(SURGES)
    assert not {c.window for c in raced} & {c.window for c in held}
    assert {c.window for c in futures} & {c.window for c in held}
    assert not {c.window for c in futures} & surges
    as_it_was = window_cells(brief)
    assert [c.window for c in as_it_was] == sorted(recent, reverse=True)
    assert all(cell in race_cells(brief, as_it_was) for cell in as_it_was)
    assert all(len(c.trace) == len(c.counts) for c in [*raced, *held, *futures, screen_cell(brief)])
    again = race_cells(brief)
    assert all(
        np.array_equal(a.trace.arrival_s, b.trace.arrival_s)
        for a, b in zip(raced, again, strict=True)
    )


def test_a_race_begins_with_surges_of_the_newest_windows():
    brief = uneven_brief()
    surges = [c for c in race_cells(brief) if c.window >= len(brief.windows)]
    assert [race_cells(brief)[at].window >= len(brief.windows) for at in (0, 1, 2)] == [
        True,
        False,
        True,
    ]
    newest = brief.windows[-SURGE_WINDOWS:]
    requests = sum(int(brief.counting(t).sum()) for t in newest)
    lasted_s = sum(t.arrival_s[-1] - brief.warmup_s for t in newest)
    tokens = sum(int(t.input_tokens[brief.counting(t)].sum()) for t in newest)
    for cell, surge in zip(surges, SURGES, strict=True):
        assert len(cell.trace) == requests
        assert cell.counts.all()
        assert cell.trace.arrival_s[-1] == pytest.approx(lasted_s / surge.rate, rel=0.1)
        assert cell.trace.input_tokens.sum() == pytest.approx(tokens * surge.prompts, rel=0.15)


def test_the_probe_knows_behaviour_from_text():
    brief = uneven_brief()
    probe = Probe(brief.replicas, brief.objective, 5)

    def decisions(score: str, more: str = "") -> bytes:
        return probe.decisions(
            program(f"def score(request, replica, fleet):\n    return {score}\n{more}")
        )

    plain = decisions("replica.in_flight")
    assert decisions("3.0 * replica.in_flight + 7.0") == plain
    assert decisions("replica.in_flight / replica.speed") != plain
    assert decisions("replica.in_flight - 0.01 * replica.prefix_hit_tokens") != plain
    assert decisions("replica.in_flight - 5.0 * replica.session_here") != plain
    assert (
        decisions("replica.in_flight + 100.0 * replica.age_s") == plain
    )  # the twin cannot judge it
    admit = "def admit(request, fleet):\n    return 30.0 - fleet.in_flight / fleet.replicas\n"
    assert decisions("replica.in_flight", admit) != plain
    order = "def priority(request, fleet):\n    return request.input_tokens\n"
    assert decisions("replica.in_flight", order) == plain  # nothing is ever held
    hold = "def ceiling(request, replica, fleet):\n    return 8.0\n"
    assert decisions("replica.in_flight", hold) != plain
    assert decisions("replica.in_flight", order + hold) != decisions("replica.in_flight", hold)
    assert probe.decisions(program(RANDOM)) == Probe(brief.replicas, brief.objective, 5).decisions(
        program(RANDOM)
    )
