"""The comparison on real processes, and what their telemetry says of who served and what was made."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_scenes import CALM, SHIFT
from telemetry.telemetry_rows import window_row

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import State
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.evaluation import recorded
from autopoiesis.evaluation.live import LiveError, fleet_options, live
from autopoiesis.evaluation.scenario import Segment, situation_of
from autopoiesis.orchestrator.replay_fleet import Served
from autopoiesis.telemetry.records import SynthesisRow
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.outcome import Status

BEGAN_S = 1.7e9
ARMS = {arm.name: arm for arm in seed_arms()}
GOOD, BAD = ARMS["least-tokens"], ARMS["round-robin"]


def synthesis(made: str, beaten: str, at_s: float) -> SynthesisRow:
    return SynthesisRow(
        BEGAN_S + at_s - 3.0, 1, "regret", "genetic", 3.0, 2.5, 70, 0.25, beaten, (made,)
    )


@pytest.fixture(scope="module")
def shift(traces):
    return situation_of(SHIFT, 0, traces)


def test_a_run_is_told_from_its_telemetry(shift, tmp_path):
    telemetry = tmp_path / "telemetry.duckdb"
    served = Served(None, 0.0)  # what clients saw is not the file's to say
    with Store.open(telemetry) as store:
        for arm in (GOOD, BAD):
            store.save_arm(replace(arm, state=State.SHADOW))
        store.save_arm(replace(BAD, state=State.LIVE))
        store.save_arm(replace(BAD, state=State.RETIRED))
        for window, arm in ((-1, GOOD), (0, GOOD), (1, BAD)):
            cell = Cell(arm.id, ("replica-0", "replica-1"), tuple(range(SHARDS)), 1.0)
            store.write_allocation(Allocation(window + 5, (cell,)))
            from_s = BEGAN_S + window * shift.window_s
            store.write_window(
                replace(window_row(window + 5), started_s=from_s, ended_s=from_s + shift.window_s)
            )
        store.write_synthesis(synthesis(BAD.id, GOOD.id, 6.0))
        store.write_synthesis(synthesis(GOOD.id, BAD.id, 8.0))
        store.write_synthesis(SynthesisRow(BEGAN_S, 2, "drift", "genetic", 1.0, 0.5, 0, 0.0))
    told = recorded.ran(shift, served, telemetry, BEGAN_S)
    assert told.served is served
    assert (told.promoted, told.live) == (2, 1)
    assert (told.harmful, told.harmful_live) == (1, 1)
    assert (told.spent.cycles, told.spent.cpu_s, told.spent.tokens) == (3, 5.5, 140)
    assert told.spent.cost_usd == 0.5
    assert told.decisions == {0: GOOD.name, 1: BAD.name}
    assert told.said == f"{BAD.source}\n{GOOD.source}"


def test_what_is_made_after_the_last_request_harms_nobody(shift, tmp_path):
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        store.save_arm(GOOD)
        store.save_arm(BAD)
        store.write_synthesis(synthesis(BAD.id, GOOD.id, shift.trace.duration_s + 1.0))
    told = recorded.ran(shift, Served(None, 0.0), tmp_path / "telemetry.duckdb", BEGAN_S)
    assert (told.promoted, told.harmful) == (1, 0)


def test_real_processes_serve_a_situation_under_the_arm_that_was_ordered(traces):
    short = replace(CALM, past=(Segment("short", 0.3, 4.0),), judged=(Segment("short", 0.3, 8.0),))
    situation = situation_of(short, 0, traces)
    ran = live("human/least-tokens", situation)
    outcome = ran.served.outcome
    assert len(outcome.arrival_s) == len(situation.trace) > 10
    assert np.all(outcome.status == int(Status.COMPLETED))
    assert np.all(outcome.first_token_s > outcome.arrival_s)
    assert np.all(outcome.finished_s >= outcome.first_token_s)
    assert set(ran.decisions.values()) == {"least-tokens"}
    assert (ran.promoted, ran.spent.cycles) == (0, 0)


def test_real_servers_need_an_interpreter_that_has_vllm(traces, monkeypatch):
    monkeypatch.delenv("AUTOPOIESIS_VLLM_PYTHON", raising=False)
    with pytest.raises(LiveError, match="AUTOPOIESIS_VLLM_PYTHON"):
        fleet_options(situation_of(replace(CALM, vllm=True), 0, traces))
