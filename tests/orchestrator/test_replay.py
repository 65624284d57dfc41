import orjson
import pytest
from traffic import LEAST_REQUESTS_BUT_ELSEWHERE, fleet, human, poisson, shifting, written

from autopoiesis.arms.arm import State
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.loop import LoopSettings
from autopoiesis.orchestrator.replay import Newcomer, Request, replay
from autopoiesis.orchestrator.triggers import TriggerSettings

OBJECTIVE = Objective(0.5, 0.04)
ARMS = ("random", "round-robin", "least-requests", "least-tokens")
RESULT_KEYS = [
    "policy",
    "kind",
    "utility",
    "goodput",
    "completed",
    "shed",
    "failed",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_mean_s",
    "e2e_p99_s",
    "replica_seconds",
]
REPORT_KEYS = [
    "trace",
    "requests",
    "duration_s",
    "windows",
    "seed",
    "replicas",
    "profile",
    "objective",
    "simulated_requests_per_s",
    "best_human",
    "arms_created",
    "results",
]


@pytest.fixture(scope="module")
def report():
    told = []
    made = replay(
        shifting(0), fleet(4), human(*ARMS), OBJECTIVE, 0,
        window_s=5.0, progress=lambda what, done: told.append((what, done)),
    )  # fmt: skip
    assert {what for what, _ in told} == {*ARMS, "online"}
    assert all(0.0 <= done <= 1.0 for _, done in told)
    return made


def test_the_report_is_the_object_that_the_command_line_promises(report):
    told = orjson.loads(orjson.dumps(report.as_dict()))
    assert set(REPORT_KEYS) <= set(told)
    assert all(set(RESULT_KEYS) <= set(r) for r in told["results"])
    kinds = {r["policy"]: r["kind"] for r in told["results"]}
    assert kinds == {**dict.fromkeys(ARMS, "human"), "online": "online", "oracle": "oracle"}
    assert told["best_human"] in ARMS
    assert told["arms_created"] == 0
    for r in told["results"]:
        assert 0.0 <= r["utility"] <= 1.0
        assert r["completed"] + r["shed"] + r["failed"] == told["requests"]


def test_the_online_system_beats_drawing_an_arm_and_comes_near_the_best(report):
    utility = {r["policy"]: r["utility"] for r in report.results}
    uniform = sum(utility[a] for a in ARMS) / len(ARMS)
    best = max(utility[a] for a in ARMS)
    assert best - uniform > 0.01
    assert utility["online"] > uniform
    assert utility["online"] > best - 0.5 * (best - uniform)
    assert utility["oracle"] >= best


def test_a_replay_repeats_itself(report):
    again = replay(shifting(0), fleet(4), human(*ARMS), OBJECTIVE, 0, window_s=5.0)
    assert again.results == report.results


def test_synthesis_is_asked_with_the_past_only_and_its_arm_serves_after_the_shadow():
    requests: list[Request] = []

    def evolve(request: Request) -> list[Newcomer]:
        requests.append(request)
        arm = written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer", State.CANDIDATE)
        return [Newcomer(arm, like=request.arms[0].id, gain=0.05)]

    trace = poisson(5, 26, 60, 1200, 150)
    settings = LoopSettings(triggers=TriggerSettings(target=1.0, cooldown_s=15.0))
    report = replay(
        trace, fleet(4), human("random"), OBJECTIVE, 0,
        evolve=evolve, window_s=5.0, settings=settings,
    )  # fmt: skip
    assert report.arms_created == 1
    assert len(requests) >= 2
    for request in requests:
        assert len(request.recent) <= (trace.arrival_s < request.trigger.at_s).sum()
        assert request.recent.duration_s <= request.trigger.at_s
    served = [c.arm_id for s in report.settled for c in s.cells]
    assert written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer").id in served
    by_kind = [r["kind"] for r in report.results]
    assert by_kind == ["human", "online", "oracle"]


def test_without_the_online_system_only_arms_and_oracle_run():
    report = replay(
        poisson(0, 10, 10, 300, 50), fleet(2), human("random"), OBJECTIVE, 0, online=False
    )
    assert [r["policy"] for r in report.results] == ["random", "oracle"]
    only, oracle = report.results
    assert only["utility"] == oracle["utility"]


def test_a_replay_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one arm"):
        replay(poisson(0, 10, 10, 300, 50), fleet(2), (), OBJECTIVE, 0)
