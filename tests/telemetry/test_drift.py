import numpy as np
import pytest
from river.drift import ADWIN

from autopoiesis.telemetry.drift import WARM_UP, Adwin, DriftMonitor


def alarms(x: np.ndarray) -> list[int]:
    adwin = Adwin()
    return [i for i, value in enumerate(x) if adwin.update(value)]


def river_alarms(x: np.ndarray) -> list[int]:
    adwin = ADWIN(delta=0.002, clock=1)
    found = []
    for i, value in enumerate(x):
        adwin.update(float(value))
        if adwin.drift_detected:
            found.append(i)
    return found


def stream(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return np.clip(np.r_[rng.normal(0.3, 0.1, 500), rng.normal(0.45, 0.1, 500)], 0, 1)
    if kind == "coin":
        return np.r_[rng.random(500) < 0.2, rng.random(500) < 0.6].astype(float)
    return np.r_[rng.beta(2, 5, 500), rng.beta(5, 2, 500)]


@pytest.mark.parametrize("kind", ["normal", "coin", "beta"])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_change_that_river_finds_at_most_thirty_observations_earlier(
    kind: str, seed: int
) -> None:
    ours, theirs = alarms(stream(kind, seed)), river_alarms(stream(kind, seed))
    assert len(ours) == len(theirs) == 1
    assert 500 <= ours[0] <= theirs[0]
    assert theirs[0] - ours[0] <= 30


@pytest.mark.parametrize("seed", range(5))
def test_it_is_silent_where_river_is_silent(seed: int) -> None:
    x = np.random.default_rng(seed).random(1500)
    assert alarms(x) == river_alarms(x) == []


def test_the_window_is_what_came_since_the_change() -> None:
    adwin = Adwin()
    x = stream("beta", 1)
    for value in x:
        adwin.update(value)
    assert 480 <= len(adwin) <= 520
    assert adwin.mean == pytest.approx(x[-len(adwin) :].mean())


def test_memory_grows_with_the_logarithm_of_the_window() -> None:
    adwin = Adwin()
    for value in np.random.default_rng(0).random(4000):
        adwin.update(value)
    assert len(adwin) == 4000
    assert adwin.state().shape[1] <= 5 * 12


def test_bucket_statistics_are_those_of_the_window() -> None:
    adwin = Adwin()
    x = np.random.default_rng(0).random(777)
    for value in x:
        adwin.update(value)
    size, mean, spread = adwin.state()
    variance = (spread.sum() + size @ (mean - adwin.mean) ** 2) / size.sum()
    assert adwin.mean == pytest.approx(x.mean())
    assert variance == pytest.approx(x.var())


def test_a_restored_detector_goes_on_as_if_nothing_had_happened() -> None:
    x = stream("normal", 2)
    for cut in (0, 3, 200, 520):
        adwin = Adwin()
        for value in x[:cut]:
            adwin.update(value)
        again = Adwin.restored(adwin.state())
        assert [adwin.update(v) for v in x[cut:]] == [again.update(v) for v in x[cut:]]
        np.testing.assert_array_equal(adwin.state(), again.state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Adwin().update(bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Adwin(delta=0)
    with pytest.raises(ValueError, match="buckets"):
        Adwin.restored(np.ones((2, 3)))


def noise(kind: str, seed: int, n: int) -> np.ndarray:
    """Noise of standard deviation 1."""
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        return rng.lognormal(0, 1, n) / 2.16
    x = rng.normal(size=n)
    if kind == "autocorrelated":
        for i in range(1, n):
            x[i] = 0.6 * x[i - 1] + 0.8 * x[i]
    return x


@pytest.mark.parametrize("kind", ["independent", "autocorrelated", "lognormal"])
@pytest.mark.parametrize("scale", [0.01, 1000.0])
def test_the_monitor_is_quick_and_seldom_wrong_in_any_unit(kind: str, scale: float) -> None:
    runs, false_alarms, delays = 8, 0, []
    for seed in range(runs):
        x = noise(kind, seed, 360)
        x[300:] += 3
        monitor = DriftMonitor(least_spread=1e-6)
        fired = [i for i, v in enumerate(x) if monitor.observe({"reward": 50 + scale * v})]
        false_alarms += any(i < 300 for i in fired)
        delays += [i - 300 for i in fired if i >= 300][:1]
    assert false_alarms <= 1
    assert len(delays) == runs
    assert np.median(delays) <= 14


def test_the_monitor_names_what_drifted_and_starts_that_one_anew() -> None:
    rng = np.random.default_rng(3)
    monitor = DriftMonitor()
    fired: list[tuple[str, ...]] = []
    for window in range(140):
        shift = 1.0 if window >= 100 else 0.0
        residuals = {
            "context": 0.1 * rng.normal(),
            "arm/aaaa": 0.1 * rng.normal() + shift,
            "twin": float("nan"),
            "constant": 0.0,
        }
        fired.append(monitor.observe(residuals))
    assert [names for names in fired if names] == [("arm/aaaa",)]
    assert 100 <= fired.index(("arm/aaaa",)) <= 110


def test_a_residual_that_hardly_moves_is_no_reason_for_alarm() -> None:
    monitor = DriftMonitor(least_spread=0.01)
    assert not any(monitor.observe({"reward": 0.0 if w < 50 else 0.005}) for w in range(150))


def test_one_freak_is_no_drift() -> None:
    rng = np.random.default_rng(4)
    x = 0.1 * rng.normal(size=200)
    x[120] = 1e9
    monitor = DriftMonitor()
    assert not any(monitor.observe({"reward": v}) for v in x)


@pytest.mark.parametrize("cut", [5, WARM_UP - 1, WARM_UP, 110])
def test_a_restored_monitor_fires_at_the_same_windows(cut: int) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=200)
    x[100:] += 4
    whole, first = DriftMonitor(), DriftMonitor()
    expected = [whole.observe({"a/b": v, "c": -v}) for v in x]
    for v in x[:cut]:
        first.observe({"a/b": v, "c": -v})
    second = DriftMonitor.restored({"bandit/mean": np.ones(2), **first.state()})
    assert [second.observe({"a/b": v, "c": -v}) for v in x[cut:]] == expected[cut:]
    assert any(expected)
