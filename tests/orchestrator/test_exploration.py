"""How much of the fleet who may have: nobody more than half unproven, and exploring costs little."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import Drive
from traffic import human, poisson, registry

from autopoiesis.orchestrator.allocator import MOST_LOSS, Limits, concentrated

MANY = ("random", "round-robin", "least-requests", "least-tokens", "session-affinity", "least-kv")


@pytest.fixture(scope="module", params=[2, 4])
def run(request):
    """Two replicas are one cell, in which arms take turns; four are two cells."""
    trace = poisson(0, 6.0 * request.param, 100, 1200, 150)
    return Drive(registry(*human(*MANY)), trace, request.param).run(20)


def test_no_arm_has_more_than_half_of_the_fleet_before_a_switchback_confirmed_it(run):
    confirmed: set[str] = set()
    cells = len(run.allocations[0].cells)
    first = max(run.allocations[0].arms(), key=run.allocations[0].share)
    names = {arm.name: arm.id for arm in run.loop.registry.all()}
    for allocation in run.allocations:
        in_turns = any(
            s.first_window <= allocation.window < s.first_window + len(s.order)
            for s in run.switchbacks
        )
        settled = [s for s in run.settled if s.window.window < allocation.window - 1]
        confirmed |= {
            names[e.subject]
            for s in settled
            for e in s.events
            if e.message.startswith("confirmed by a switchback")
        }
        for arm in allocation.arms():
            if cells > 1 and arm != first and arm not in confirmed and not in_turns:
                assert allocation.share(arm) <= 0.55


def test_exploring_costs_little_from_the_first_window_on(run):
    """The loop may lose to exploration what it may lose; poor arms have hardly a window to themselves."""
    worst = run.loop.registry.get("random").id
    assert np.mean(run.share(worst)) < 0.1
    assert run.share(worst)[0] == 0.0


@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
    st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    st.sampled_from([1, 2, 4, 16]),
)
def test_what_exploring_is_expected_to_cost_is_bounded(weights, losses, cells):
    names = [f"a{i}" for i in range(len(weights))]
    p = dict(zip(names, (np.array(weights) / np.sum(weights)).tolist(), strict=True))
    gaps = dict(zip(names, losses, strict=False))
    unproven = frozenset(names[1:])
    result = concentrated(p, Limits(unconfirmed=unproven), cells, 0.25, None, None, gaps)
    assert sum(result.values()) == pytest.approx(1.0)
    assert min(result.values()) >= 0.0
    leading = {max(p, key=lambda a: p[a]), names[0]}
    cost = sum(q * gaps[a] for a, q in result.items() if a not in leading)
    assert cost <= MOST_LOSS + 1e-9
