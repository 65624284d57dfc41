"""Rows that differ in every field, for the tests of this room."""

from collections.abc import Sequence

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CellRow,
    EventRow,
    ReplicaSample,
    RequestRecord,
    Status,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.telemetry.store import Store

START_S = 1_790_000_000.123457
WINDOW_S = 10.0


def request(number: int, window: int = 0, arrived_s: float | None = None) -> RequestRecord:
    return RequestRecord(
        id=f"request-{window}-{number}",
        arrived_s=START_S + WINDOW_S * window + number / 1000 if arrived_s is None else arrived_s,
        path="/v1/chat/completions",
        model="llama",
        status=list(Status)[number % len(Status)],
        http_status=200 + number % 2,
        arm_id=("aaaa", "bbbb")[number % 2],
        window=window,
        shard=number % 64,
        session=-(2**62) + number,
        replica=f"r-{number % 4}",
        attempts=1 + number % 2,
        stream=number % 2 == 0,
        input_tokens=1000 + number,
        output_tokens=20 + number,
        max_output_tokens=400 + number,
        cached_tokens=256,
        usage_counted=number % 3 == 0,
        priority_class=number / 7,
        held_s=0.01 * number,
        decision_s=0.0003,
        ttft_s=None if number % 2 else 0.2 + number / 1000,
        e2e_s=1.5 + number,
        blocks=tuple(range(-number, number % 5)),
    )


def window_row(window: int) -> WindowRow:
    return WindowRow(
        window=window,
        started_s=START_S + WINDOW_S * window,
        ended_s=START_S + WINDOW_S * (window + 1),
        objective={"slo_ttft_s": 1.0, "slo_tpot_s": 0.1},
        context={"arrival_rate_rps": 3.5, "input_tokens_mean": 900.0 + window},
        requests=40,
        completed=35,
        shed=3,
        failed=2,
        throughput_tokens_s=512.5,
        ttft_p50_s=0.2,
        ttft_p99_s=None,
        tpot_p50_s=0.03,
        tpot_p99_s=0.07,
        goodput_rps=3.1,
        utility=0.8,
        regret=0.05,
        regret_low=0.01,
        regret_high=0.11,
        drift="reward" if window % 5 == 4 else "",
        twin_weight=0.4,
    )


def cell_row(window: int, cell: int) -> CellRow:
    return CellRow(
        window=window,
        cell=cell,
        arm_id=("aaaa", "bbbb")[cell % 2],
        replicas=(f"r-{2 * cell}", f"r-{2 * cell + 1}"),
        shards=48 if cell == 0 else 16,
        propensity=0.7 if cell == 0 else 0.3,
        requests=20,
        completed=17,
        shed=2,
        failed=1,
        unfinished=4,
        input_tokens=9000,
        output_tokens=900,
        ttft_p50_s=0.21,
        ttft_p99_s=0.9,
        tpot_p50_s=0.031,
        goodput_rps=1.5,
        utility=0.9 - 0.2 * cell,
        replica_seconds=20.0,
    )


def allocation(window: int) -> Allocation:
    return Allocation(
        window,
        (
            Cell("aaaa", ("r-0", "r-1"), tuple(range(48)), 0.7),
            Cell("bbbb", ("r-2", "r-3"), tuple(range(48, 64)), 0.3),
        ),
    )


def estimates() -> list[ArmEstimate]:
    return [
        ArmEstimate("aaaa", 0.82, 0.9, 0.88, 0.86, 0.02, 0.75),
        ArmEstimate("bbbb", 0.81, None, None, 0.7, 0.09, 0.25),
    ]


def twin_error(window: int) -> TwinErrorRow:
    return TwinErrorRow(window, "ttft_mean_s", 0.25, 0.2)


def replica_sample(window: int, number: int) -> ReplicaSample:
    return ReplicaSample(
        at_s=START_S + WINDOW_S * window + number,
        replica=f"r-{number}",
        address="127.0.0.1:9000",
        healthy=number % 2 == 0,
        in_flight=number,
        running=3.0,
        waiting=1.0,
        kv_usage=0.4,
        prefix_queries_total=1000.0,
        prefix_hits_total=400.0,
        preemptions_total=2.0,
    )


def event(window: int, subject: str = "aaaa", message: str = "promoted") -> EventRow:
    return EventRow(START_S + WINDOW_S * window + 1.5, "arm", window, subject, message)


def fill(store: Store, windows: Sequence[int], requests: int = 20) -> None:
    for window in windows:
        store.write_window(
            window_row(window),
            [cell_row(window, 0), cell_row(window, 1)],
            [request(i, window) for i in range(requests)],
            estimates(),
            allocation(window + 1),
            [twin_error(window)],
            [replica_sample(window, i) for i in range(4)],
            [event(window)],
        )
