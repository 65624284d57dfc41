import numpy as np
import pytest

from autopoiesis.arms.objective import Objective

NAN = np.nan


def test_utility():
    objective = Objective(slo_ttft_s=1.0, slo_tpot_s=0.1)
    ttft = np.array([0.5, 1.0, 2.0, 0.5, 2.0, 0.5, NAN, NAN, 0.0])
    tpot = np.array([0.05, 0.1, 0.1, 0.4, 0.2, NAN, 0.1, NAN, 0.0])
    expected = [1, 1, 0.5, 0.25, 0.25, 1, 0, 0, 1]
    assert objective.utility(ttft, tpot) == pytest.approx(expected)
    assert objective.met(ttft, tpot).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def test_utility_is_one_exactly_where_both_objectives_are_met():
    rng = np.random.default_rng(1)
    objective = Objective(0.7, 0.05)
    ttft, tpot = rng.exponential(0.7, 500), rng.exponential(0.05, 500)
    utility = objective.utility(ttft, tpot)
    assert ((utility == 1.0) == objective.met(ttft, tpot)).all()
    assert ((utility > 0) & (utility <= 1)).all()


@pytest.mark.parametrize("bad", [(0.0, 1.0), (1.0, -1.0), (NAN, 1.0)])
def test_objectives_are_above_zero(bad):
    with pytest.raises(ValueError, match="above 0 s"):
        Objective(*bad)


def test_as_dict():
    objective = Objective(2.0, 0.2, 0.5)
    assert objective.as_dict() == {"slo_ttft_s": 2.0, "slo_tpot_s": 0.2, "late_worth": 0.5}


def test_late_answers_are_worth_a_share_of_their_timeliness():
    objective = Objective(1.0, 0.1, late_worth=0.1)
    ttft_s, tpot_s = np.array([1.0, 1.25, 2.0, np.nan]), np.array([0.1, 0.1, 0.2, 0.1])
    np.testing.assert_allclose(objective.utility(ttft_s, tpot_s), [1.0, 0.08, 0.025, 0.0])


@pytest.mark.parametrize("late_worth", [-0.1, 1.1, float("nan")])
def test_a_late_answer_is_not_worth_less_than_nothing_or_more_than_one_in_time(late_worth: float):
    with pytest.raises(ValueError, match="late_worth"):
        Objective(late_worth=late_worth)
