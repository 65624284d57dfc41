"""What an arm would have earned: right where the twin is wrong, honest where the arm never played."""

import json

import pytest
from gateway_process import run
from lived_instance import live_through
from traffic import human, poisson, registry

from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.counterfactual import CounterfactualError
from autopoiesis.orchestrator.counterfactual_command import counterfactual_command
from autopoiesis.orchestrator.reward import utilities
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec, run_arm

OBJECTIVE = Objective(0.12, 0.03)
PROFILE = "a100-llama-3-8b-tp1-bf16"
NAMES = ("random", "least-requests", "least-tokens", "round-robin")


def replicas(speed: float) -> list[ReplicaSpec]:
    return [ReplicaSpec(f"r{i}", profile(PROFILE), speed) for i in range(4)]


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """Serve on replicas slower than the twin believes; tell what each arm alone would have earned."""
    trace = poisson(5, 16, 200, 1200, 150)
    arms = human(*NAMES)
    real = replicas(0.85)
    folder = tmp_path_factory.mktemp("lived")
    data_dir = live_through(folder, trace, real, replicas(1.0), arms, OBJECTIVE, 10.0)
    known = registry(*arms)
    truth = {
        arm.name: float(
            utilities(
                run_arm(trace, real, known.program(arm.id), OBJECTIVE, 0), OBJECTIVE, float("inf")
            )[0].mean()
        )
        for arm in arms
    }
    return Settings(data_dir=data_dir, profile=(PROFILE,), seed=1), truth


@pytest.fixture(scope="module")
def report(lived):
    return counterfactual_command(lived[0], NAMES, None, quiet=True)


def test_intervals_hold_the_truth_and_correction_brings_the_twin_closer(lived, report):
    truth = lived[1]
    told = {arm.policy: arm for arm in report.arms}
    assert set(told) == set(NAMES)
    assert all(arm.low <= truth[name] <= arm.high for name, arm in told.items()), (truth, told)
    twin = sum(abs(told[n].twin - truth[n]) for n in NAMES)
    corrected = sum(abs(told[n].utility - truth[n]) for n in NAMES)
    assert corrected < twin
    assert report.arms[0].policy == max(truth, key=lambda name: truth[name])


def test_who_played_more_is_known_better(report):
    played = sorted(report.arms, key=lambda arm: arm.weight)
    least, most = played[0], played[-1]
    assert most.high - most.low < least.high - least.low
    assert most.windows_played > least.windows_played


def test_it_repeats_itself_and_fewer_windows_can_be_asked_for(lived, report):
    settings = lived[0]
    assert counterfactual_command(settings, NAMES, None, quiet=True) == report
    fewer = counterfactual_command(settings, ["random"], 8, quiet=True)
    assert (fewer.windows, len(fewer.arms)) == (8, 1)
    assert fewer.last_window == report.last_window
    with pytest.raises(CounterfactualError, match="stored windows"):
        counterfactual_command(settings, ["random"], 2, quiet=True)


def test_the_command_evaluates_a_file_and_prints_the_table(lived, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(request, replica, fleet):\n    return replica.running\n"
    )
    folder = str(lived[0].data_dir)
    code, out, errors = run(
        "replay", "--counterfactual", "--data-dir", folder, "--arm", "mine.py", "--arm", "random",
        "--profile", PROFILE, "--windows", "6", "--json", "told.json", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, errors
    assert "6 windows" in out
    told = json.loads((tmp_path / "told.json").read_text())
    assert {arm["policy"] for arm in told["arms"]} == {"mine", "random"}
    assert told["windows"] == 6
    mine = next(arm for arm in told["arms"] if arm["policy"] == "mine")
    assert mine["windows_played"] == 0
    assert mine["low"] < mine["utility"] < mine["high"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--counterfactual"),
        (("x.parquet", "--counterfactual"), "--counterfactual"),
        (("x.parquet", "--windows", "5"), "--windows"),
        (("--counterfactual", "--arm", "nobody"), "nobody"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(lived, tmp_path, arguments, says):
    code, _, errors = run("replay", *arguments, "--data-dir", str(lived[0].data_dir), cwd=tmp_path)
    assert (code, True) == (2, says in errors), errors
    assert "Traceback" not in errors
