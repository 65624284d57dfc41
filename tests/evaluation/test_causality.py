"""No contestant sees the future: with another tail, the decisions before it are the same."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_scenes import SHIFT, TINY

from autopoiesis.evaluation.contestants import FROZEN, OURS, SWITCHING, contestants
from autopoiesis.evaluation.scenario import situation_of

CUT_S = 20.0
"""After the past and in the middle of what is judged."""


def with_another_tail(situation, seed):
    """Permute lengths of what arrives after the cut, and halve its gaps."""
    trace = situation.trace
    after = np.flatnonzero(trace.arrival_s >= CUT_S)
    order = np.random.default_rng(seed).permutation(after)
    columns = {}
    for name in ("input_tokens", "output_tokens"):
        columns[name] = getattr(trace, name).copy()
        columns[name][after] = getattr(trace, name)[order]
    arrival_s = trace.arrival_s.copy()
    arrival_s[after] = CUT_S + (arrival_s[after] - CUT_S) / 2
    return replace(situation, trace=replace(trace, arrival_s=arrival_s, **columns))


@pytest.fixture(scope="module")
def situation(traces):
    return situation_of(SHIFT, 3, traces)


@pytest.mark.parametrize(
    "name", ["human/least-tokens", "tuned/least-tokens", FROZEN, SWITCHING, OURS]
)
def test_another_future_changes_no_decision_before_it(situation, name):
    serve = contestants()[name]
    seen, other = (
        serve(s, TINY).served.outcome for s in (situation, with_another_tail(situation, 1))
    )
    before = seen.dispatched_s < CUT_S
    assert before.sum() > 100
    assert np.array_equal(before, other.dispatched_s < CUT_S)
    assert np.array_equal(seen.replica[before], other.replica[before])
    assert np.array_equal(seen.dispatched_s[before], other.dispatched_s[before])
    assert not np.array_equal(seen.replica, other.replica)  # the tail was another one
