import numpy as np

from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.reward import utilities
from autopoiesis.telemetry.records import OpenRequest, RequestRecord, Status
from autopoiesis.twin.recorded import observed


def record(status=Status.COMPLETED, ttft_s=0.2, e2e_s=0.4, output_tokens=3):
    return RequestRecord(
        id="r", arrived_s=1000.0, path="/v1/completions", model="m", status=status, http_status=200, arm_id="a",
        window=1, shard=3, session=0, replica="x", attempts=1, stream=True, input_tokens=10,
        output_tokens=output_tokens, max_output_tokens=64, cached_tokens=0, usage_counted=True, priority_class=0.0,
        held_s=0.0, decision_s=0.0, ttft_s=ttft_s, e2e_s=e2e_s,
    )  # fmt: skip


def test_an_end_that_was_timed_before_the_first_token_is_no_negative_time():
    outcome = observed([record(ttft_s=0.21, e2e_s=0.2)], replicas=["x"])[1]
    utility, counts = utilities(outcome, Objective(1.0, 0.1), now_s=1001.0)

    assert [0.0] == outcome.tpot_s.tolist()
    assert [1.0] == utility.tolist()
    assert counts.all()


def test_requests_that_are_nobodys_are_left_out():
    outcome = observed([record(Status.REJECTED), record(Status.ABORTED), record(Status.SHED)])[1]

    assert 1 == len(outcome.arrival_s)


def test_open_requests_count_once_their_first_token_is_out_or_late():
    waiting = [
        OpenRequest(
            arrived_s=1000.0,
            shard=0,
            input_tokens=5,
            max_output_tokens=9,
            replica="x",
            first_token_s=1000.5,
        ),
        OpenRequest(arrived_s=1000.1, shard=0, input_tokens=5, max_output_tokens=9, replica="x"),
        OpenRequest(arrived_s=1003.5, shard=0, input_tokens=5, max_output_tokens=9),
    ]
    outcome = observed([], waiting, ["x"])[1]
    utility, counts = utilities(outcome, Objective(1.0, 0.1), now_s=1004.1)

    assert [True, True, False] == counts.tolist()
    np.testing.assert_allclose([1.0, 0.25], utility[:2])
