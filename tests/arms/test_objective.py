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
    assert Objective(2.0, 0.2).as_dict() == {"slo_ttft_s": 2.0, "slo_tpot_s": 0.2}
