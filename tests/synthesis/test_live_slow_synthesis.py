"""Cycles of a running controller judge plans where plans are carried out, and only there."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms, slow_seeds
from autopoiesis.orchestrator.fleet_watch import specs_of
from autopoiesis.orchestrator.governor import Governor
from autopoiesis.orchestrator.growing import Growing
from autopoiesis.orchestrator.growing_plans import pair_id, planning_brief
from autopoiesis.orchestrator.growth import brief_of
from autopoiesis.orchestrator.live_yards import past_of
from autopoiesis.orchestrator.loop import WindowLoop
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import Status
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.replicas.fleet import Member
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.telemetry.records import Reconfiguration, RequestRecord, WindowRow
from autopoiesis.telemetry.records import Status as Ending
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.recorded import observed

BEGAN_S = 1.7e9
WINDOWS = 60
PROFILES = ("h100-llama-3-8b-tp1-bf16",) * 4 + ("h100-llama-3-8b-tp2-bf16",)
MEMBERS = tuple(
    Member(f"r{i}", f"127.0.0.1:{i + 1}", profile) for i, profile in enumerate(PROFILES)
)
STOPPED = ("stop", 24.0), ("start", 36.0)
"""What was done to r2, and when."""
LOST = range(30, 48)
"""Windows in which r3 did not answer."""
FAST = [arm for arm in seed_arms() if arm.name in {"least-requests", "round-robin"}]


def request(number: int, arrived_s: float) -> RequestRecord:
    return RequestRecord(
        id=f"r{number}", arrived_s=arrived_s, path="/v1/completions", model="m", status=Ending.COMPLETED,
        http_status=200, arm_id="", window=-1, shard=number % 64, session=0, replica="r0", attempts=1,
        stream=True, input_tokens=900, output_tokens=150, max_output_tokens=1024, cached_tokens=0,
        usage_counted=True, priority_class=0.0, held_s=0.0, decision_s=0.001, ttft_s=0.2, e2e_s=1.0,
    )  # fmt: skip


def change(action: str, at_s: float) -> Reconfiguration:
    return Reconfiguration(
        "r2", action, BEGAN_S + at_s, seconds=2.0, drain_s=1.0 if action == "stop" else 0.0,
        load_s=1.5, import_s=0.25, engine_s=0.25,
    )  # fmt: skip


def serving(window: int) -> tuple[str, ...]:
    away = {"r2"} if 24 <= window < 38 else set()
    away |= {"r3"} if window in LOST else set()
    return tuple(m.name for m in MEMBERS if m.name not in away)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Yield what an instance has stored whose r2 was stopped for a while, and whose r3 was lost for another."""
    blank = WindowRow(0, 0.0, 0.0, {}, {}, 0, 0, 0, 0, 0.0, *[None] * 4, 0.0, *[None] * 4, "", 0.0)
    rng, number = np.random.default_rng(3), 0
    with Store.open(tmp_path_factory.mktemp("lived") / "telemetry.duckdb") as opened:
        registry = Registry(opened)
        for arm in FAST:
            registry.add(arm)
        for window in range(WINDOWS):
            from_s = BEGAN_S + window
            cell = Cell(FAST[0].id, serving(window), tuple(range(64)), 1.0)
            opened.write_allocation(Allocation(window, (cell,)))
            row = replace(blank, window=window, started_s=from_s, ended_s=from_s + 1, requests=40)
            arrivals = np.sort(rng.uniform(from_s, from_s + 1, 40))
            requests = [request(number + k, at_s) for k, at_s in enumerate(arrivals.tolist())]
            changes = [change(action, at_s) for action, at_s in STOPPED if at_s == window]
            opened.write_window(row, requests=requests, reconfigurations=changes)
            number += len(requests)
        yield opened


def settings(folder, **chosen) -> Settings:
    given = {"slow_policy": "never", "window_s": 1.0, "slo_ttft_s": 0.06, "slo_tpot_s": 0.008}
    return Settings(data_dir=folder / ".autopoiesis", **{**given, **chosen})


TRIGGER = Trigger("regret", WINDOWS - 1, BEGAN_S + WINDOWS, "test", WINDOWS - 3)


def plain_brief(chosen: Settings, store: Store) -> Brief:
    recent, _ = observed(store.requests_between(BEGAN_S + WINDOWS - 14, BEGAN_S + WINDOWS))
    return brief_of(TRIGGER, recent, specs_of(MEMBERS), FAST, (), chosen)


def asked(chosen: Settings, store: Store, now_s: float = BEGAN_S + WINDOWS):
    fleet = specs_of(MEMBERS)
    return planning_brief(plain_brief(chosen, store), FAST, FAST[0].id, fleet, chosen, store, now_s)


def test_stopped_replicas_could_have_been_used_and_lost_ones_could_not(store):
    past = past_of(store.query, BEGAN_S, BEGAN_S + WINDOWS)
    stretches = {round(stretch.started_s - BEGAN_S): stretch for stretch in past.stretches}
    assert sorted(stretches) == list(range(WINDOWS))
    assert all(past.there(stretch, "r2") for stretch in stretches.values())
    assert [w for w, s in stretches.items() if not past.there(s, "r3")] == list(LOST)
    assert not past.there(stretches[0], "nobody")


def test_a_live_brief_has_the_fleet_s_past_and_what_changes_took(store, tmp_path):
    chosen = settings(tmp_path, plan_control="on", plan_max_changes=3)
    found = asked(chosen, store)
    brief = found.brief
    assert (len(brief.windows), len(brief.holdout), len(brief.yards)) == (4, 1, 5)
    began = {t.name: 12 * int(t.name.split("[")[1][:-1]) for t in (*brief.windows, *brief.holdout)}
    for trace, yard in zip((*brief.windows, *brief.holdout), brief.yards, strict=True):
        for at_s in range(12):
            lost = began[trace.name] + at_s in LOST
            assert yard.gpu("h100").at(at_s + 0.01) == (5 if lost else 6)
        first = sum(yard.first.kinds().values())
        assert first == len(serving(began[trace.name]))
        assert (yard.load_s, yard.engine_s, yard.drain_s, yard.stop_s) == pytest.approx(
            (1.5, 0.5, 1, 2)
        )
        assert yard.max_changes == 3
        assert {way.tensor_parallel for way in yard.ways} == {1, 2}
    never = next(seed.policy.source for seed in slow_seeds() if seed.name == "never")
    assert {i.slow for i in brief.incumbents} == {never}
    assert found.arm_of == {pair_id(arm.source, never): arm.id for arm in FAST}
    assert len(brief.archived) == len(slow_seeds())
    assert Brief.from_bytes(brief.to_bytes()).yards == brief.yards


def test_too_short_a_past_asks_for_no_plans(store, tmp_path):
    with pytest.raises(BriefError, match="a cycle that judges plans needs 4"):
        asked(settings(tmp_path, plan_control="on"), store, BEGAN_S + 30.0)


def grown(store: Store, chosen: Settings) -> tuple[list[list], str]:
    """Let the controller's part for synthesis run one cycle; return its candidates and what it beat."""
    registry = Registry(store)

    async def cycle() -> None:
        status = Status(chosen, registry)
        loop = WindowLoop(registry, Objective(0.5, 0.015), 0)
        governor = Governor(registry, store, status.say, loop.constrain)
        growing = Growing(
            chosen, store, registry, MEMBERS, loop, governor, status, Metrics(status, registry),
            asyncio.Lock(), lambda *_: None,
        )  # fmt: skip
        since_s = BEGAN_S + WINDOWS - 14
        recent, _ = observed(store.requests_between(since_s, BEGAN_S + WINDOWS))
        growing.begin(TRIGGER, recent, specs_of(MEMBERS))
        assert growing.task
        await growing.task

    asyncio.run(cycle())
    newest = "(select max(synthesis) from syntheses)"
    rows = store.query(
        f"select gate, reason, slow, gain, thought from candidates where synthesis = {newest}"
    )
    ((beaten, error),) = store.query(
        f"select beaten, error from syntheses where synthesis = {newest}"
    ).rows
    assert error == ""
    return [list(row) for row in rows.rows], beaten


def test_where_plans_are_carried_out_slow_functions_are_judged_too(store, tmp_path):
    chosen = settings(tmp_path, plan_control="on", synthesis_budget_s=20.0)
    rows, beaten = grown(store, chosen)
    judged = [row for row in rows if row[0] != "verify" and row[3] is not None]
    assert len(judged) >= 3, rows
    assert all(slow for _, _, slow, *_ in judged)
    assert beaten in {arm.id for arm in FAST}
    assert any("known before this cycle" in row[4] for row in judged)


def test_where_no_plan_is_carried_out_nothing_slow_is_varied(store, tmp_path):
    chosen = settings(tmp_path, plan_control="dry-run", synthesis_budget_s=4.0)
    rows, beaten = grown(store, chosen)
    assert len(rows) > 0
    assert not any(slow for _, _, slow, *_ in rows)
    assert beaten in {arm.id for arm in FAST}
