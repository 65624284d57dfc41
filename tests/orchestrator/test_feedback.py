import numpy as np
import pytest
from traffic import fleet, human, poisson, registry

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.feedback import (
    PROVEN_WINDOWS,
    Played,
    TwinCorrection,
    regret_of,
    twin_errors,
)
from autopoiesis.orchestrator.rehearsal import affordable
from autopoiesis.orchestrator.rerun import replay_under
from autopoiesis.twin.backlog import no_backlog
from autopoiesis.twin.cells import SimCell

OBJECTIVE = Objective(0.3, 0.03)


def seen(utility: float, propensity: float = 0.5, predicted: float = 0.8) -> Played:
    return Played(utility, propensity, 100, predicted)


def test_a_right_twin_is_left_alone_and_trusted():
    correction = TwinCorrection()
    rng = np.random.default_rng(0)
    for _ in range(40):
        twin = {"a": rng.uniform(0.5, 1.0), "b": rng.uniform(0.5, 1.0)}
        estimates = correction.learn(twin, {"a": seen(twin["a"])})
    assert estimates == pytest.approx(twin, abs=1e-6)
    assert correction.trust == 1.0
    assert correction.weight == 0.5


def test_a_bias_that_all_arms_share_is_not_taken_for_the_played_ones():
    correction = TwinCorrection()
    rng = np.random.default_rng(0)
    for _ in range(60):
        twin = {a: rng.uniform(0.6, 0.9) for a in "abc"}
        arm = "ab"[int(rng.integers(2))]
        estimates = correction.learn(twin, {arm: seen(twin[arm] - 0.2)})
    for arm in "abc":
        assert estimates[arm] - twin[arm] == pytest.approx(-0.2, abs=0.03)


def test_an_arm_that_wins_only_in_the_twin_is_seen_through_in_three_windows():
    correction = TwinCorrection()
    twin = {"fraud": 0.95, "honest": 0.85}
    for _ in range(20):
        correction.learn(twin, {"honest": seen(0.85, 0.95)})
    for _ in range(3):
        estimates = correction.learn(twin, {"fraud": seen(0.5, 0.95)})
    assert estimates["fraud"] < estimates["honest"]


def test_a_twin_that_is_wildly_wrong_loses_its_say():
    correction = TwinCorrection()
    rng = np.random.default_rng(0)
    for _ in range(40):
        twin = {a: rng.random() for a in "ab"}
        correction.learn(twin, {"a": seen(rng.uniform(0.78, 0.82), predicted=0.8)})
    assert correction.trust < 0.05


def test_estimates_stay_utilities_and_survive_being_saved():
    correction = TwinCorrection()
    estimates = correction.learn({"a": 0.99, "b": 0.01}, {"a": seen(0.0), "unknown": seen(1.0)})
    assert all(0.0 <= e <= 1.0 for e in estimates.values())
    again = TwinCorrection.from_dict(correction.to_dict())
    twin = {"a": 0.5, "b": 0.6}
    assert again.learn(twin, {"b": seen(0.4)}) == correction.learn(twin, {"b": seen(0.4)})


def test_the_estimate_is_unbiased_where_the_twin_is_biased():
    """Mean error of the estimate of an arm that rarely plays, over many histories."""
    errors, naive = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        correction = TwinCorrection()
        for _ in range(25):
            truth = {"a": 0.8 + rng.normal(0, 0.03), "b": 0.7 + rng.normal(0, 0.03)}
            twin = {"a": truth["a"] + 0.1, "b": truth["b"] - 0.1}
            p = {"a": 0.75, "b": 0.25}
            arm = "a" if rng.random() < p["a"] else "b"
            estimates = correction.learn(twin, {arm: seen(truth[arm], p[arm])})
        errors.append(estimates["b"] - estimates["a"] - (truth["b"] - truth["a"]))
        naive.append(twin["b"] - twin["a"] - (truth["b"] - truth["a"]))
    assert abs(np.mean(errors)) < 0.4 * abs(np.mean(naive))


@pytest.fixture(scope="module")
def rehearsed():
    trace = poisson(3, 24, 30, 1500, 150)
    arms = registry(*human("random", "least-requests", "least-tokens"))
    programs = {a.id: arms.program(a.id) for a in arms.all()}
    names = {a.name: a.id for a in arms.all()}
    bounds_s = (0.0, 10.0, 20.0, 30.0)
    everything = (0, 1, 2), tuple(range(SHARDS))
    nowhere = no_backlog(len(trace))
    judged = {
        arm: replay_under(
            trace, nowhere, fleet(3), [SimCell(program, *everything)], OBJECTIVE, bounds_s, 0
        )
        for arm, program in programs.items()
    }
    return names, judged, trace


def test_a_window_is_replayed_under_each_arm_and_only_its_requests_count(rehearsed):
    names, judged, trace = rehearsed
    inside = ((trace.arrival_s >= 10.0) & (trace.arrival_s < 20.0)).sum()
    assert {len(j.utility) for j in judged.values()} == {inside}
    random, least = (judged[names[n]].mean_utility() for n in ("random", "least-tokens"))
    assert random < least


def test_regret_is_what_the_best_arm_would_have_gained(rehearsed):
    _names, judged, _ = rehearsed
    twin = {a: j.mean_utility() for a, j in judged.items()}
    correction = TwinCorrection()
    for _ in range(30):
        estimates = correction.learn(twin, {a: seen(u) for a, u in twin.items()})
    worst, best = min(twin, key=twin.__getitem__), max(twin, key=twin.__getitem__)
    regret = regret_of(estimates, {worst: 50.0}, judged, correction)
    assert regret is not None
    assert regret.best == best
    assert regret.value == pytest.approx(twin[best] - twin[worst], abs=1e-6)
    assert 0.0 < regret.low < regret.value < regret.high
    none = regret_of(estimates, {best: 50.0}, judged, correction)
    assert none is not None
    assert (none.value, none.low) == (0.0, 0.0)
    assert regret_of(estimates, {"unknown": 1.0}, judged, correction) is None


def test_the_twins_errors_are_rows_per_metric(rehearsed):
    names, judged, _ = rehearsed
    arm = names["random"]
    rows = twin_errors(7, judged[arm], judged, {arm: 1.0})
    assert [r.metric for r in rows] == ["ttft_mean_s", "tpot_mean_s", "e2e_mean_s", "utility"]
    assert all(r.observed == pytest.approx(r.twin) for r in rows)
    assert twin_errors(7, judged[arm], judged, {}) == []


def test_the_budget_limits_how_many_arms_are_replayed():
    assert affordable(["a", "b", "c"], 100, 250) == ["a", "b"]
    assert affordable(["a", "b", "c"], 100_000, 250) == ["a"]


def test_of_an_arms_own_error_only_what_chance_does_not_make_is_sure():
    correction, rng = TwinCorrection(), np.random.default_rng(0)
    twin = {"honest": 0.8, "overrated": 0.8}
    for _ in range(12):
        noise = rng.normal(0.0, 0.08, 2)
        played = {
            "honest": Played(0.8 + noise[0], 0.5, 50, 0.8),
            "overrated": Played(0.4 + noise[1], 0.5, 50, 0.8),
        }
        correction.learn(twin, played)
    gap = correction.surely("honest") - correction.surely("overrated")
    assert 0.1 < gap < 0.4
    assert correction.surely("unknown") == 0.0
    for arm in twin:
        assert abs(correction.surely(arm)) < abs(correction.own(arm))


def test_a_twin_is_proven_by_several_windows_and_by_none_that_it_misses():
    correction, right = TwinCorrection(), {"a": 0.8}
    proven = []
    for _ in range(PROVEN_WINDOWS + 2):
        correction.learn(right, {"a": Played(0.8, 0.5, 50, 0.7)})
        proven.append(correction.is_proven)
    assert proven.index(True) == PROVEN_WINDOWS - 1
    for i in range(8):
        utility = 0.2 if i % 2 else 1.0
        correction.learn(right, {"a": Played(utility, 0.5, 50, utility)})
    assert not correction.is_proven
