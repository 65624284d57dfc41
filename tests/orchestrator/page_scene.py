"""An instance with an hour behind it: windows, arms with children, two syntheses, drift, a lost replica."""

import math
from pathlib import Path

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.language import verify
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CandidateRow,
    CellRow,
    EventRow,
    ReplicaSample,
    RequestRecord,
    Status,
    SynthesisRow,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.telemetry.store import Store

WINDOWS = 72
WINDOW_S = 10.0
REPLICAS = ("r0", "r1", "r2", "r3")
CHILD = "def score(request, replica, fleet):\n    return replica.in_flight / replica.speed + replica.kv_usage\n"
GRANDCHILD = (
    "def score(request, replica, fleet):\n"
    "    return replica.in_flight / replica.speed + 2 * replica.kv_usage\n"
)


def write_scene(file: Path, now_s: float) -> dict[str, str]:
    """Fill a telemetry file that ends at `now_s`; return the ids of some arms by name."""
    with Store.open(file) as store:
        registry = Registry(store)
        for arm in seed_arms():
            registry.add(arm)
        parent = registry.get("least-requests")
        child = registry.add(_child(CHILD, "gen-kv-aware", (parent.id,), now_s - 400))
        young = registry.add(_child(GRANDCHILD, "gen-kv-wary", (child.id, parent.id), now_s - 200))
        registry.move(child.id, State.CANARY, "beat the incumbents by 0.021 in the race")
        registry.move(child.id, State.LIVE, "6 windows served, not worse than the control")
        registry.move(young.id, State.CANARY, "beat the incumbents by 0.012 in the race")
        ids = {arm.name: arm.id for arm in registry.all()}
        for window in range(WINDOWS):
            _write_window(store, window, now_s, ids)
        store.write_synthesis(
            _cycle(now_s - 400, 32, child, parent.id, 0.021, "regret 0.06 for 3 windows")
        )
        store.write_synthesis(
            _cycle(now_s - 200, 52, young, child.id, 0.012, "drift of the context")
        )
    return ids


def _child(source: str, name: str, parents: tuple[str, ...], at_s: float) -> Arm:
    policy = verify(source)
    return Arm(
        policy.id,
        name,
        Origin.GENETIC,
        State.CANDIDATE,
        policy.source,
        at_s,
        parents,
        thought="Full caches preempt; keep away from them.",
    )


def _write_window(store: Store, window: int, now_s: float, ids: dict[str, str]) -> None:
    started_s = now_s - (WINDOWS - window) * WINDOW_S
    learned = min(1.0, window / 40)
    swing = 0.5 + 0.5 * math.sin(window / 7)
    regret = 0.12 * (1 - learned) + 0.02 * swing
    row = WindowRow(
        window=window,
        started_s=started_s,
        ended_s=started_s + WINDOW_S,
        objective={"slo_ttft_s": 1.0, "slo_tpot_s": 0.1},
        context={"arrival_rate_rps": 8 + 6 * swing, "input_tokens_mean": 1800.0},
        requests=int(80 + 60 * swing),
        completed=int(78 + 60 * swing),
        shed=1,
        failed=1,
        throughput_tokens_s=900 + 700 * swing,
        ttft_p50_s=0.2 + 0.2 * swing,
        ttft_p99_s=0.9 + 0.9 * swing * (1.4 - learned),
        tpot_p50_s=0.02 + 0.01 * swing,
        tpot_p99_s=0.05 + 0.06 * swing,
        goodput_rps=7.4 + 5 * swing,
        utility=0.97 - regret,
        regret=regret,
        regret_low=max(0.0, regret - 0.03),
        regret_high=regret + 0.04,
        drift="context" if window in {30, 51} else "",
        twin_weight=0.5,
    )
    cells = _cells(window, ids)
    store.write_window(
        row,
        [
            CellRow(window, i, c.arm_id, c.replicas, len(c.shards), c.propensity, row.requests // 2, row.completed // 2,
                    0, 0, 1, 90_000, 9_000, 0.2, 0.9, 0.03, row.goodput_rps / 2, 0.97 - regret - 0.02 * i, 20.0)
            for i, c in enumerate(cells)
        ],
        [_request(window, i, started_s, cells[i % 2].arm_id) for i in range(8)],
        [ArmEstimate(arm_id, 0.92, None, 0.93, 0.9 + 0.004 * i, 0.02, 1 / len(ids))
         for i, arm_id in enumerate(ids.values())],
        Allocation(window + 1, _cells(window + 1, ids)),
        [TwinErrorRow(window, "ttft_mean_s", 0.3 + 0.2 * swing, 0.28 + 0.22 * swing),
         TwinErrorRow(window, "utility", 0.97 - regret, 0.96 - regret)],
        [ReplicaSample(started_s + 5, name, "127.0.0.1:1", name != "r3", 4, 3.0, 1.0, 0.3 + 0.5 * swing,
                       1000.0 * window, 420.0 * window, 0.0) for name in REPLICAS],
        [EventRow(started_s + 9, "drift", window, "context", "the workload has changed: input tokens")]
        if row.drift else [],
    )  # fmt: skip


def _cells(window: int, ids: dict[str, str]) -> tuple[Cell, ...]:
    leader = "prefix-affinity" if window < 20 else "least-requests"
    if window >= 38:
        leader = "gen-kv-aware"
    if window < 6:
        challenger = "round-robin"
    elif window >= 54:
        challenger = "gen-kv-wary"
    elif 32 <= window < 38:
        challenger = "gen-kv-aware"
    else:
        challenger = leader
    return (
        Cell(ids[leader], REPLICAS[:2], tuple(range(44)), 0.9),
        Cell(ids[challenger], REPLICAS[2:], tuple(range(44, SHARDS)), 0.1),
    )


def _request(window: int, number: int, started_s: float, arm_id: str) -> RequestRecord:
    return RequestRecord(
        id=f"request-{window}-{number}",
        arrived_s=started_s + number,
        path="/v1/chat/completions",
        model="simulated",
        status=Status.COMPLETED,
        http_status=200,
        arm_id=arm_id,
        window=window,
        shard=number,
        session=number,
        replica=REPLICAS[number % 4],
        attempts=1,
        stream=True,
        input_tokens=1800,
        output_tokens=120,
        max_output_tokens=256,
        cached_tokens=512,
        usage_counted=True,
        priority_class=0.0,
        held_s=0.0,
        decision_s=0.0003,
        ttft_s=0.3,
        e2e_s=3.0,
    )


def _cycle(
    at_s: float, window: int, promoted: Arm, beaten: str, gain: float, why: str
) -> SynthesisRow:
    lost = "def score(request, replica, fleet):\n    return replica.waiting\n"
    return SynthesisRow(
        started_s=at_s,
        window=window,
        trigger=f"regret: {why}",
        synthesizer="genetic",
        seconds=11.8,
        cpu_seconds=19.4,
        tokens=0,
        cost_usd=0.0,
        beaten=beaten,
        promoted=(promoted.id,),
        candidates=(
            CandidateRow(promoted.id, promoted.source, "promoted", "promoted", "wins on the holdout", gain,
                         gain - 0.008, gain + 0.009, promoted.parents, promoted.thought),
            CandidateRow("", lost, "rejected", "screen", "worse than the best incumbent", -0.2, -0.25, -0.15),
            CandidateRow("", "def score(:", "rejected", "verify", "line 1: not an expression", None, None, None),
        ),
        conclusion=f"{promoted.name} gains {gain:.3f}; 3 candidates looked at",
    )  # fmt: skip
