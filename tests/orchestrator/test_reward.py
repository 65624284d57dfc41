import numpy as np
import pytest
from traffic import fleet, human, poisson, registry

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.reward import (
    cell_rows,
    fresh_shards,
    judge,
    met,
    shard_load,
    utilities,
    utility_by_arm,
    window_row,
)
from autopoiesis.telemetry.records import OpenRequest, RequestRecord, Status
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.outcome import Status as Ending
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.simulation import run_arm

OBJECTIVE = Objective(slo_ttft_s=1.0, slo_tpot_s=0.1)


def record(at_s: float, status: Status = Status.COMPLETED, **changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "id": f"q{at_s}",
        "arrived_s": at_s,
        "path": "/v1/completions",
        "model": "m",
        "status": status,
        "http_status": 200,
        "arm_id": "a",
        "window": 0,
        "shard": 0,
        "session": 0,
        "replica": "r0",
        "attempts": 1,
        "stream": True,
        "input_tokens": 100,
        "output_tokens": 11,
        "max_output_tokens": 64,
        "cached_tokens": 0,
        "usage_counted": True,
        "priority_class": 0.0,
        "held_s": 0.0,
        "decision_s": 0.0,
        "ttft_s": 0.5,
        "e2e_s": 1.5,
    }
    return RequestRecord(**(values | changes))  # pyright: ignore[reportArgumentType]


def still_open(at_s: float, first_token_s: float | None = None) -> OpenRequest:
    return OpenRequest(at_s, 0, 100, 64, replica="r0", first_token_s=first_token_s)


def test_each_kind_of_request_by_hand():
    records = [
        record(0.0),  # met
        record(1.0, ttft_s=2.0, e2e_s=3.0),  # first token twice too late
        record(2.0, Status.SHED, ttft_s=None, output_tokens=0),
        record(3.0, Status.FAILED, ttft_s=None, output_tokens=0),
        record(4.0, stream=False, ttft_s=None, e2e_s=4.0),  # 1 + 10 * 0.1 s allowed
        record(5.0, Status.REJECTED),
        record(6.0, Status.ABORTED),
    ]
    unfinished = [still_open(7.0), still_open(19.5), still_open(8.0, 12.0), still_open(9.0, 9.5)]
    outcome = observed(records, unfinished)[1]
    utility, counts = utilities(outcome, OBJECTIVE, now_s=20.0)
    assert outcome.arrival_s.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 19.5]
    assert counts.tolist() == [*[True] * 8, False]
    assert utility[counts] == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.5, 1 / 13, 0.25, 1.0])
    assert met(outcome, OBJECTIVE).tolist() == [True, *[False] * 8]


def test_live_records_are_judged_as_the_twin_is():
    trace = poisson(0, 30, 20, 800, 100)
    arm = human("least-requests")[0]
    outcome = run_arm(trace, fleet(2), registry(arm).program(arm.id), OBJECTIVE, 0)
    ttft_s, e2e_s = outcome.ttft_s, outcome.e2e_s
    records = [
        record(
            float(outcome.arrival_s[i]),
            shard=int(outcome.shard[i]),
            input_tokens=int(outcome.input_tokens[i]),
            output_tokens=int(outcome.output_tokens[i]),
            ttft_s=float(ttft_s[i]),
            e2e_s=float(e2e_s[i]),
        )
        for i in range(len(trace))
    ]
    again = observed(records)[1]
    expected = utilities(outcome, OBJECTIVE, 1e9)[0]
    assert expected.min() < 1.0
    assert utilities(again, OBJECTIVE, 1e9)[0] == pytest.approx(expected)


def test_a_shed_request_is_replayed_with_the_usual_length():
    trace, outcome = observed([record(0.0), record(1.0, Status.SHED, ttft_s=None, output_tokens=0)])
    assert trace.output_tokens.tolist() == [11, 11]
    assert outcome.output_tokens.tolist() == [11, 0]


def two_cells() -> Allocation:
    half = SHARDS // 2
    return Allocation(
        3,
        (
            Cell("a", ("r0", "r1"), tuple(range(half)), 0.7),
            Cell("b", ("r2",), tuple(range(half, SHARDS)), 0.3),
        ),
    )


def test_burn_in_is_dropped_where_the_arm_is_new():
    before = Allocation(2, (Cell("a", ("r0", "r1", "r2"), tuple(range(SHARDS))),))
    fresh = fresh_shards(two_cells(), before)
    assert not fresh[:32].any()
    assert fresh[32:].all()
    records = [record(100.0 + i, shard=s, ttft_s=0.5) for i in range(10) for s in (0, 40)]
    outcome = observed(records)[1]
    judged = judge(outcome, OBJECTIVE, 100.0, 110.0, 120.0, fresh)
    assert judged.counts.sum() == 10 + 7
    assert fresh_shards(two_cells(), None).all()


def test_rows_of_cells_and_window_add_up():
    records = [record(100.0 + i, shard=s) for i in range(5) for s in (0, 40)]
    records += [
        record(101.5, Status.SHED, shard=40, ttft_s=None),
        record(99.0),
        record(111.0),
        record(102.5, ttft_s=3.0, e2e_s=4.0, shard=1),
    ]
    judged = judge(observed(records, [still_open(105.0)])[1], OBJECTIVE, 100.0, 110.0, 120.0)
    a, b = cell_rows(judged, two_cells())
    assert (a.requests, a.completed, a.shed, a.unfinished, a.replica_seconds) == (7, 6, 0, 1, 20.0)
    assert (b.requests, b.completed, b.shed, b.shards, b.propensity) == (6, 5, 1, 32, 0.3)
    assert b.utility == pytest.approx(5 / 6)
    assert a.utility == pytest.approx((5 + 1 / 3 + 1 / 15) / 7)
    assert utility_by_arm([a, b])["b"] == (b.utility, 6)
    row = window_row(judged, 3, OBJECTIVE, {"bias": 1.0}, (0.1, 0.0, 0.2), ("twin", "reward"), 0.4)
    assert (row.requests, row.completed, row.shed, row.failed) == (13, 11, 1, 0)
    assert row.goodput_rps == pytest.approx(1.0)
    assert row.drift == "twin,reward"
    assert (row.regret, row.regret_low, row.regret_high) == (0.1, 0.0, 0.2)
    assert shard_load(judged).sum() == pytest.approx(13.0)


def test_an_empty_window_has_rows_without_values():
    judged = judge(observed([])[1], OBJECTIVE, 0.0, 10.0, 20.0)
    rows = cell_rows(judged, two_cells())
    assert [r.utility for r in rows] == [None, None]
    assert utility_by_arm(rows) == {}
    row = window_row(judged, 0, OBJECTIVE, {}, None, (), 0.0)
    assert row.utility is None
    assert row.ttft_p50_s is None
    assert np.all(shard_load(judged) == 0.0)


def test_a_stream_under_way_counts_as_if_it_went_on_at_its_pace():
    """Half of the objective's pace is late, whether its tokens are counted or told by its replica's others."""
    slow_s = 2.0 * OBJECTIVE.slo_tpot_s
    ended, counted, uncounted, elsewhere = 0, 1, 2, 3
    outcome = Outcome(
        arrival_s=np.zeros(4),
        input_tokens=np.full(4, 100),
        output_tokens=np.full(4, 101),
        shard=np.zeros(4, np.int64),
        cell=np.zeros(4, np.int64),
        replica=np.array([0, 1, 0, 2]),
        dispatched_s=np.zeros(4),
        first_token_s=np.full(4, 0.1),
        finished_s=np.array([0.1 + 100 * slow_s, np.nan, np.nan, np.nan]),
        status=np.array([Ending.COMPLETED, Ending.PENDING, Ending.PENDING, Ending.PENDING]),
        cached_tokens=np.zeros(4, np.int64),
        generated_tokens=np.array([101, 51, -1, 1001]),
    )
    now_s = 0.1 + 100 * slow_s
    told = judge(outcome, OBJECTIVE, 0.0, now_s, now_s)
    assert told.counts.all()
    late = OBJECTIVE.graded(np.array([0.5]))[0]
    assert told.utility[[ended, uncounted]] == pytest.approx(late)
    assert told.utility[counted] == pytest.approx(OBJECTIVE.graded(np.array([0.25]))[0])
    assert told.utility[elsewhere] == 1.0
