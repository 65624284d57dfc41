import numpy as np
import pytest
from bayesianbandits import NormalRegressor, StabilizedForgetting
from hypothesis import given, settings
from hypothesis import strategies as st
from mabwiser.linear import _LinTS
from mabwiser.utils import create_rng

from autopoiesis.orchestrator.bandit import BanditSettings, LinearThompson, capped, inverse_gap

F = 4


def context(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([[1.0], rng.normal(size=F - 1)])


def test_beliefs_equal_those_of_bayesianbandits_with_stabilised_forgetting():
    settings_ = BanditSettings(gamma=0.95, prior_precision=4.0, max_inflation=1e9)
    bandit = LinearThompson(F, settings_)
    bandit.add("a", 0.0)
    oracle = NormalRegressor(alpha=4.0, beta=1.0)
    rng = np.random.default_rng(0)
    oracle.partial_fit(np.zeros((1, F)), np.zeros(1))
    for _ in range(200):
        bandit.tick()
        oracle.decay(StabilizedForgetting(0.95))
        if rng.random() < 0.5:
            x, y = context(rng), rng.normal()
            bandit.update("a", x, y)
            oracle.partial_fit(x[None], np.array([y]))
    upper = np.triu_indices(F)
    assert bandit.precision("a")[upper] == pytest.approx(
        np.asarray(oracle.cov_inv_)[upper], rel=1e-9
    )
    assert bandit.weights("a") == pytest.approx(oracle.coef_, abs=1e-9)


def test_probabilities_agree_with_mabwisers_thompson_sampling():
    rng = np.random.default_rng(1)
    bandit = LinearThompson(
        F, BanditSettings(gamma=1.0, prior_precision=1.0, floor=0.0, draws=20_000)
    )
    models = {}
    for k, arm in enumerate("abc"):
        bandit.add(arm, 0.0)
        xs = np.array([context(rng) for _ in range(12)])
        ys = xs @ rng.normal(0.3, 0.1, F) + 0.05 * k + rng.normal(0, 0.5, 12)
        for x, y in zip(xs, ys, strict=True):
            bandit.update(arm, x, y)
        models[arm] = (xs, ys)
    x = context(rng)
    samples = []
    for seed, (arm, (xs, ys)) in enumerate(models.items()):
        model = _LinTS(create_rng(seed), alpha=bandit.scale, l2_lambda=1.0)
        model.init(F)
        model.fit(xs, ys)
        assert bandit.weights(arm) == pytest.approx(model.beta, abs=1e-9)
        samples.append(model.predict(np.repeat(x[None], 20_000, axis=0)))
    theirs = np.bincount(np.argmax(samples, axis=0), minlength=3) / 20_000
    ours = bandit.probabilities(x, np.random.default_rng(2))
    assert list(ours.values()) == pytest.approx(theirs, abs=0.02)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.just("a"), st.just(0.0)),
        st.tuples(st.just("add"), st.sampled_from("abcd"), st.floats(0, 1)),
        st.tuples(st.just("remove"), st.sampled_from("abcd"), st.just(0.0)),
        st.tuples(st.just("update"), st.sampled_from("abcd"), st.floats(0, 5)),
        st.tuples(st.just("temper"), st.just("a"), st.floats(0, 1)),
        st.tuples(st.just("warm"), st.sampled_from("abcd"), st.floats(0, 50)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.integers(0, 100), st.integers(1, 3))
def test_after_any_operations_beliefs_are_proper_and_probabilities_sum_to_one(steps, seed, cells):
    rng = np.random.default_rng(seed)
    bandit = LinearThompson(F, BanditSettings(draws=50))
    for name, arm, number in steps:
        if name == "tick":
            bandit.tick()
        elif name == "temper":
            bandit.temper(number)
        elif name == "add" and arm not in bandit.arms:
            bandit.add(arm, number)
        elif arm in bandit.arms:
            if name == "remove":
                bandit.remove(arm)
            elif name == "update":
                bandit.update(arm, 3.0 * context(rng), rng.random(), number)
            elif name == "warm":
                bandit.warm_start(arm, None, 0.1, number)
    for arm in bandit.arms:
        precision = bandit.precision(arm)
        assert np.array_equal(precision, precision.T)
        assert np.linalg.eigvalsh(precision).min() >= 4.0 * (1 - 1e-6)
    mean, sd = bandit.predict(context(rng))
    assert np.all(np.isfinite(mean))
    assert np.all(sd > 0)
    if bandit.arms:
        caps = dict.fromkeys(bandit.arms[1:], 0.5)
        p = bandit.probabilities(context(rng), rng, caps=caps, sample=cells > 1)
        assert list(p) == bandit.arms
        assert sum(p.values()) == pytest.approx(1.0)
        assert all(p[a] <= 0.5 + 1e-9 for a in caps)
        assert min(p.values()) > 0.0


def test_removing_and_adding_leaves_the_others_and_no_memory():
    rng = np.random.default_rng(0)
    bandit = LinearThompson(F)
    for arm in "abc":
        bandit.add(arm)
        bandit.update(arm, context(rng), rng.random())
    a, c = bandit.weights("a").copy(), bandit.weights("c").copy()
    bandit.remove("b")
    bandit.add("b")
    assert bandit.weights("a") == pytest.approx(a)
    assert bandit.weights("c") == pytest.approx(c)
    assert bandit.weights("b") == pytest.approx([0.5, 0, 0, 0])
    assert bandit.observations("b") == 0.0
    with pytest.raises(ValueError, match="there already"):
        bandit.add("b")


def test_the_best_arm_wins_and_the_floor_remains():
    rng = np.random.default_rng(0)
    bandit = LinearThompson(F)
    for arm, value in {"bad": 0.3, "good": 0.8, "middling": 0.5}.items():
        bandit.add(arm)
        for _ in range(30):
            bandit.update(arm, context(rng), value + rng.normal(0, 0.05))
    for cells in (1, 4):
        p = bandit.probabilities(context(rng), rng, sample=cells > 1)
        assert p["good"] > 0.9
        assert min(p.values()) >= 0.02 / 3
    assert set(bandit.probabilities(context(rng), rng, eligible=["bad", "middling"])) == {
        "bad",
        "middling",
    }
    with pytest.raises(ValueError, match="eligible"):
        bandit.probabilities(context(rng), rng, eligible=[])


@pytest.mark.parametrize("sample", [True, False])
def test_free_arms_are_told_apart_though_limited_ones_beat_them_all(sample):
    bandit = LinearThompson(1)
    for arm, value in {"canary": 0.9, "other": 0.9, "good": 0.7, "bad": 0.4}.items():
        bandit.add(arm)
        for _ in range(200):
            bandit.update(arm, np.ones(1), value)
    limits = {"canary": 0.125, "other": 0.125}
    p = bandit.probabilities(np.ones(1), np.random.default_rng(0), caps=limits, sample=sample)
    assert p["canary"] + p["other"] == pytest.approx(0.25)
    assert p["good"] > 0.7
    assert p["bad"] < 0.02


def test_what_is_forgotten_is_bounded_by_the_prior_and_the_inflation_cap():
    bandit = LinearThompson(F, BanditSettings(gamma=0.9, max_inflation=2.0))
    bandit.add("a", 0.0)
    x = np.array([1.0, 0.0, 0.0, 0.0])
    for _ in range(100):
        bandit.update("a", x, 0.7)
    mean, before = bandit.weights("a").copy(), bandit.precision("a")[0, 0]
    for _ in range(500):
        bandit.tick()
    assert bandit.weights("a") == pytest.approx(mean)
    assert bandit.precision("a")[0, 0] >= before / 2.3


def test_a_warm_start_is_believed_for_its_count():
    bandit = LinearThompson(F)
    bandit.add("incumbent", np.array([0.6, 0.1, 0.0, 0.0]))
    bandit.add("new")
    x = np.array([1.0, 1.0, 0.0, 0.0])
    _, (_, wide) = bandit.predict(x)
    bandit.warm_start("new", "incumbent", 0.05, 20.0)
    (_, mean), (_, narrow) = bandit.predict(x)
    assert mean == pytest.approx(0.75)
    assert narrow < wide


def test_a_saved_bandit_decides_alike():
    rng = np.random.default_rng(4)
    bandit = LinearThompson(F)
    for arm in ("a", "b"):
        bandit.add(arm)
        bandit.update(arm, context(rng), rng.random())
    bandit.tick()
    twin = LinearThompson.from_arrays(bandit.to_arrays())
    x = context(rng)
    assert twin.probabilities(x, np.random.default_rng(0)) == bandit.probabilities(
        x, np.random.default_rng(0)
    )
    empty = LinearThompson.from_arrays(LinearThompson(F).to_arrays())
    assert empty.arms == []
    with pytest.raises(ValueError, match="version"):
        LinearThompson.from_arrays(bandit.to_arrays() | {"version": np.array([99.0, F])})


def test_inverse_gap_weighting_by_hand():
    assert inverse_gap(np.array([0.5, 0.4]), 10.0) == pytest.approx([2 / 3, 1 / 3])


def test_capped_by_hand():
    assert capped(np.array([0.8, 0.1, 0.1]), np.array([0.5, 1.0, 1.0])) == pytest.approx(
        [0.5, 0.25, 0.25]
    )
    assert capped(np.array([0.8, 0.2]), np.array([0.25, 0.25])) == pytest.approx([0.5, 0.5])
