"""A new arm decides real windows beside the live one before it may serve; what does badly goes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import Drive
from traffic import (
    LEAST_REQUESTS_BUT_ELSEWHERE,
    SHED_ALL,
    fleet,
    human,
    poisson,
    registry,
    written,
)

from autopoiesis.arms.arm import Origin, State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.growth import take_in
from autopoiesis.orchestrator.loop import LoopSettings, WindowLoop
from autopoiesis.orchestrator.reward import Judged, judge
from autopoiesis.orchestrator.shadow import Shadow, ShadowSettings
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.twin.simulation import run_arm

FLOOD = """
def score(request, replica, fleet):
    return replica.position
"""
STARVE = """
def score(request, replica, fleet):
    return replica.in_flight + (1000 if replica.position < 1 else 0)
"""
HOLD = """
def score(request, replica, fleet):
    return replica.in_flight

def ceiling(request, replica, fleet):
    return 1
"""


def driven(source: str, windows: int = 3, rate_rps: float = 24.0, **changes) -> tuple[Drive, str]:
    new = written(source, "new", State.SHADOW)
    arms = registry(*human("least-requests"), new)
    settings_ = LoopSettings(shadow=replace(ShadowSettings(), **changes))
    drive = Drive(arms, poisson(3, rate_rps, 5.0 * windows, 500, 100), settings=settings_)
    return drive.run(windows), new.id


def told(drive: Drive) -> list[str]:
    return [e.message for s in drive.settled for e in s.events if e.subject == "new"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SHED_ALL, "in shadow: it refuses 100% of the requests, least-requests 0%"),
        (FLOOD, "in shadow: it sends 100% of the requests to r0"),
        (STARVE, "in shadow: it starves r0"),
        (HOLD, "in the twin beside least-requests"),
    ],
)
def test_what_decides_badly_in_shadow_is_retired_with_the_reason_and_never_serves(source, reason):
    drive, new = driven(source)
    arm = drive.loop.registry.get(new)
    assert arm.state is State.RETIRED
    assert reason in arm.reason
    assert sum(drive.share(new)) == 0.0
    assert told(drive) == [f"retired: {arm.reason}"]


@pytest.mark.parametrize(("worth", "state"), [(0.6, State.CANARY), (0.5, State.RETIRED)])
def test_sending_all_to_one_replica_is_a_fault_only_where_it_earns_no_more(worth, state):
    two = fleet(2)
    trace, objective = poisson(3, 8.0, 10.0, 500, 100), Objective()

    def judged(source: str) -> Judged:
        outcome = run_arm(trace, two, compile_policy(verify(source)), objective, 0)
        return judge(outcome, objective, 0.0, 10.0, 20.0)

    both = {"new": judged(FLOOD), "live": judged(LEAST_REQUESTS_BUT_ELSEWHERE)}
    worths = {"new": worth, "live": 0.5}
    (move,) = Shadow().review(["new"], both, worths, ("live", "live"), two)
    assert move.state is state


def test_a_sane_arm_is_a_canary_after_its_first_window_in_shadow():
    drive, new = driven(LEAST_REQUESTS_BUT_ELSEWHERE, windows=4)
    assert drive.share(new)[0] == 0.0
    assert max(drive.share(new)[1:]) > 0.0
    assert drive.loop.registry.get(new).state is State.CANARY
    (message,) = told(drive)
    assert message.startswith("canary: 1 windows in shadow: utility ")
    assert "beside least-requests in the twin" in message


def test_with_too_few_requests_it_waits_and_then_goes_on():
    drive, new = driven(LEAST_REQUESTS_BUT_ELSEWHERE, windows=6, rate_rps=1.0, at_most=4)
    assert drive.share(new)[:4] == [0.0] * 4
    arm = drive.loop.registry.get(new)
    assert (arm.state, "too few requests" in arm.reason) == (State.CANARY, True)


def test_the_shadows_record_survives_a_restart():
    patient = LoopSettings(shadow=ShadowSettings(windows=3))
    new = written(LEAST_REQUESTS_BUT_ELSEWHERE, "new", State.SHADOW)
    arms = registry(*human("least-requests"), new)
    loop = Drive(arms, poisson(3, 24.0, 30.0, 500, 100), settings=patient).run(2).loop
    again = WindowLoop(arms, loop.objective, 0, patient, loop.state())
    assert again.shadow.to_dict() == loop.shadow.to_dict()
    assert loop.shadow.to_dict()[new.id]["counted"] == 2


@given(
    feature=st.sampled_from(["in_flight", "running", "waiting", "kv_usage", "position"]),
    factor=st.floats(-2.0, 2.0),
    limit=st.floats(0.0, 3.0),
)
@settings(max_examples=10, deadline=None)
def test_whatever_it_decides_it_is_out_of_the_shadow_soon_and_served_nobody_in_it(
    feature, factor, limit
):
    source = (
        f"def score(request, replica, fleet):\n    return {factor!r} * replica.{feature}\n"
        f"def admit(request, fleet):\n    return {limit!r} - fleet.draw\n"
    ).replace("return -", "return 0.0 - ")
    drive, new = driven(source, windows=3)
    arm = drive.loop.registry.get(new)
    assert arm.state is not State.SHADOW
    assert drive.share(new)[0] == 0.0
    if arm.state is State.RETIRED:
        assert arm.reason.startswith("in shadow: ")
        assert sum(drive.share(new)) == 0.0


def test_what_a_cycle_promotes_enters_into_shadow_and_known_arms_stay_where_they_are():
    policy, retired = verify(LEAST_REQUESTS_BUT_ELSEWHERE), written(SHED_ALL, "old", State.RETIRED)
    rows = [
        CandidateRow(p.id, p.source, "promoted", gate, "it gains", 0.1, 0.05, 0.15)
        for p, gate in ((policy, "tuned"), (verify(SHED_ALL), "promoted"))
    ]
    row = SynthesisRow(
        0.0, 1, "drift", "genetic", 1.0, 1.0, 0, 0.0,
        promoted=tuple(r.arm_id for r in rows), candidates=tuple(rows),
    )  # fmt: skip
    kept = registry(*human("random"), retired)
    assert [(a.id, a.state, g) for a, g in take_in(row, kept, 1.0)] == [
        (policy.id, State.SHADOW, 0.1)
    ]
    assert kept.get(policy.id).origin is Origin.TUNED
    assert kept.get(retired.id).state is State.RETIRED
