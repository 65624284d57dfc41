import numpy as np
import pytest

from autopoiesis.evaluation.contestants import ORACLE, OURS
from autopoiesis.evaluation.measures import Windows, adaptation_s
from autopoiesis.evaluation.parts import Part
from autopoiesis.evaluation.summary import Results, Rival, gain_over, summary_of, with_room

COSTS = {
    # contestant: misses by seed
    "human/a": (100, 300, 200, 100),
    "human/b": (200, 100, 300, 100),
    "tuned/a": (90, 100, 160, 90),
    OURS: (50, 60, 90, 50),
    ORACLE: (40, 40, 40, 40),
}


def part(contestant, seed, misses, scenario="s", requests=1000):
    met = requests - misses
    return Part(
        suite="t",
        scenario=scenario,
        contestant=contestant,
        seed=seed,
        row={
            "misses": misses, "miss_share": misses / requests, "utility": met / requests, "promoted": 4,
            "harmful": 1, "live": 2, "harmful_live": 1, "evolution_cpu_s": 1.0, "evolution_replays": 5,
            "evolution_tokens": 0, "evolution_usd": 0.0,
        },
        windows={"started_s": [0.0], "requests": [requests], "met": [met], "utility": [met]},
        shifts_s=[],
        window_s=10.0,
        decisions={},
        said="",
        seconds=1.0,
    )  # fmt: skip


def results(costs=COSTS, **more):
    parts = [part(c, seed, m, **more) for c, row in costs.items() for seed, m in enumerate(row)]
    return Results("t", "misses", tuple(parts))


def test_the_gain_is_over_the_best_arm_of_each_seed():
    gain = gain_over(results(), Rival(("human/a", "human/b")), ["s"], OURS)
    assert gain.mean == pytest.approx(1 - (50 + 60 + 90 + 50) / (100 + 100 + 200 + 100))
    assert gain.low <= gain.mean <= gain.high
    assert 0.3 < gain.low
    assert gain.high < 0.7


def test_the_gain_over_each_of_several_is_the_mean_of_their_gains():
    gain = gain_over(results(), Rival(("human/a", "human/b"), each=True), ["s"], OURS)
    assert gain.mean == pytest.approx(1 - 250 / 700)
    uneven = {**COSTS, "human/b": (1000, 1000, 1000, 1000)}
    gain = gain_over(results(uneven), Rival(("human/a", "human/b"), each=True), ["s"], OURS)
    assert gain.mean == pytest.approx(((1 - 250 / 700) + (1 - 250 / 4000)) / 2)


def test_equal_contestants_have_no_gain_and_no_interval_away_from_zero():
    same = {**COSTS, OURS: COSTS["human/a"]}
    gain = gain_over(results(same), Rival(("human/a",)), ["s"], OURS)
    assert gain == (0.0, 0.0, 0.0)


def test_one_seed_has_no_interval():
    one = {name: row[:1] for name, row in COSTS.items()}
    gain = gain_over(results(one), Rival(("human/a",)), ["s"], OURS)
    assert gain.mean == 0.5
    assert np.isnan(gain.low)
    assert np.isnan(gain.high)


def test_a_scenario_without_misses_has_nothing_to_gain():
    none = dict.fromkeys(COSTS, (0, 0))
    both = Results("t", "misses", (*results().parts, *results(none, scenario="calm").parts))
    assert with_room(both) == ["s"]
    assert with_room(results(none)) == []


def test_the_summary_has_the_keys_of_the_contract():
    told = summary_of(results())
    assert {"suite", "mean_gain", "gain_low", "gain_high", "against", "scenarios"} <= set(told)
    assert told["mean_gain"] == pytest.approx(0.5)
    assert told["against"] == "best human arm per trace"
    assert [s["name"] for s in told["scenarios"]] == ["s"]
    assert told["scenarios"][0]["best_human"] == ["a", "b", "a", "a"]
    assert told["harmful_share"] == 0.25
    assert told["harmful_live_share"] == 0.5
    tuned = next(c for c in told["comparisons"] if c["against"] == "best tuned arm per trace")
    assert tuned["mean_gain"] == pytest.approx(1 - 250 / 440)
    assert told["scenarios"][0]["regret"] == pytest.approx((250 - 160) / 4000)


def windows(shares):
    n = len(shares)
    requests = np.full(n, 100.0)
    return Windows(np.arange(n) * 10.0, requests, 100.0 * np.array(shares), np.zeros(n))


@pytest.mark.parametrize(
    ("shares", "shift_s", "expected"),
    [
        ([1.0, 1.0, 0.2, 0.5, 0.96, 1.0, 1.0], 20.0, 20.0),
        ([1.0, 1.0, 0.2, 1.0, 0.2, 0.2, 1.0], 20.0, None),  # one good window is not enough
        ([1.0, 1.0, 1.0, 1.0], 15.0, 0.0),
    ],
)
def test_adaptation_ends_with_two_windows_as_good_as_the_best_arm(shares, shift_s, expected):
    assert adaptation_s(windows(shares), np.ones(len(shares)), shift_s, 10.0) == expected
