import numpy as np
import pytest

from autopoiesis.orchestrator.harm import HarmTest


def windows_until(difference: float, sd: float, rng: np.random.Generator, margin: float) -> int:
    """Windows until the upper bound falls below -margin, 500 if it does not."""
    test = HarmTest()
    for n in range(1, 501):
        test = test.observe(float(rng.normal(difference, sd)))
        if test.interval[1] < -margin:
            return n
    return 500


def test_nothing_is_known_before_the_first_window():
    assert HarmTest().interval == (-0.5, 0.5)
    assert HarmTest().mean == 0.0


def test_the_interval_covers_the_truth_at_all_times():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        test = HarmTest()
        outside = False
        for _ in range(150):
            test = test.observe(float(rng.normal(-0.1, 0.15)))
            low, high = test.interval
            outside |= not low <= -0.1 <= high
        missed += outside
    assert missed <= 200 * 0.10


def test_a_harmful_arm_is_shown_harmful_and_an_equal_one_is_not():
    rng = np.random.default_rng(1)
    harmful = [windows_until(-0.35, 0.1, rng, margin=0.1) for _ in range(20)]
    assert np.median(harmful) < 40
    assert all(windows_until(0.0, 0.1, rng, margin=0.0) == 500 for _ in range(20))


def test_differences_are_taken_for_what_they_are():
    test = HarmTest()
    for _ in range(2000):
        test = test.observe(0.2)
    assert test.mean == pytest.approx(0.2)
    low, high = test.interval
    assert low < 0.2 < high
    assert high - low < 0.1
    assert HarmTest().observe(-7.0).mean == -0.5
