"""What the control port tells Prometheus, and what the dashboard asks of it."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from controller_process import controlled
from page_scene import write_scene
from prometheus_client.parser import text_string_to_metric_families

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.arms.sandbox.process import probe
from autopoiesis.gateway.link import Batch, Fault
from autopoiesis.orchestrator.doctor import examine
from autopoiesis.orchestrator.loop import Settled
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import Status
from autopoiesis.telemetry.records import (
    CandidateRow,
    OpenRequest,
    ReplicaSample,
    RequestRecord,
    SynthesisRow,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.telemetry.records import Status as Ending
from autopoiesis.telemetry.store import Store

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "autopoiesis.json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    file = tmp_path_factory.mktemp("metrics") / "telemetry.duckdb"
    write_scene(file, time.time())
    with Store.open(file) as store:
        yield Registry(store)


@pytest.fixture
def metrics(registry):
    now = [1000.0]
    status = Status(Settings(), registry)
    arms = [registry.get("gen-kv-aware").id, registry.get("round-robin").id]
    cells = (Cell(arms[0], ("r0",), tuple(range(48))), Cell(arms[1], ("r1",), tuple(range(48, 64))))
    status.allocated(Allocation(5, cells), "")
    made = Metrics(status, registry, lambda: now[0])
    made.now = now
    return made


def request(status=Ending.COMPLETED, ttft_s=0.3):
    return RequestRecord(
        id="x", arrived_s=0.0, path="/v1/completions", model="m", status=status, http_status=200, arm_id="a", window=0,
        shard=0, session=0, replica="r0", attempts=1, stream=True, input_tokens=100, output_tokens=11,
        max_output_tokens=64, cached_tokens=64, usage_counted=True, priority_class=0.0, held_s=0.02,
        decision_s=0.0003, ttft_s=ttft_s, e2e_s=1.3,
    )  # fmt: skip


def batch():
    sample = ReplicaSample(0.0, "r0", "a", True, 3, 2.0, 1.0, 0.4, 0.0, 0.0, 0.0)
    waits, runs = OpenRequest(0.0, 0, 10, 10), OpenRequest(0.0, 0, 10, 10, replica="r0")
    return Batch(1, "b", (request(), request(Ending.SHED, None)), (waits, runs), (sample,), ())


def settled(drift="context,reward"):
    row = WindowRow(
        window=4, started_s=0.0, ended_s=10.0, objective={}, context={}, requests=2, completed=1, shed=1, failed=0,
        throughput_tokens_s=1.0, ttft_p50_s=0.3, ttft_p99_s=0.3, tpot_p50_s=0.1, tpot_p99_s=0.1, goodput_rps=0.1,
        utility=0.8, regret=0.05, regret_low=0.01, regret_high=None, drift=drift, twin_weight=0.4,
    )  # fmt: skip
    return Settled(row, (), (), (TwinErrorRow(4, "ttft_mean_s", 0.4, 0.3),), (), None)


def synthesis(error=""):
    candidates = (
        CandidateRow("a", "", "promoted", "promoted", "", 0.1, 0.0, 0.2),
        CandidateRow("b", "", "rejected", "race", "", 0.1, 0.0, 0.2),
        CandidateRow("c", "", "rejected", "race", "", 0.1, 0.0, 0.2),
    )
    return SynthesisRow(
        0.0,
        4,
        "t",
        "genetic",
        11.0,
        20.0,
        500,
        0.25,
        "",
        () if error else ("a",),
        candidates,
        error,
    )


def samples(metrics):
    return parsed(metrics.exposition("")[0].decode())


def parsed(text):
    return {
        (
            sample.name.removeprefix("autopoiesis_"),
            tuple(sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_how_they_ended_with_their_times_and_tokens(metrics):
    metrics.saw(batch())
    told = samples(metrics)

    assert 1.0 == told["requests_total", (("status", "completed"),)]
    assert 1.0 == told["requests_total", (("status", "shed"),)]
    assert 0.0 == told["requests_total", (("status", "failed"),)]
    assert 100.0 == told["prompt_tokens_total", ()]
    assert 64.0 == told["prompt_tokens_cached_total", ()]
    assert 22.0 == told["generation_tokens_total", ()]
    assert 0.0 == told["time_to_first_token_seconds_bucket", (("le", "0.25"),)]
    assert 1.0 == told["time_to_first_token_seconds_bucket", (("le", "0.5"),)]
    assert 0.1 == pytest.approx(told["time_per_output_token_seconds_sum", ()])
    assert 1.3 == told["e2e_request_latency_seconds_sum", ()]
    assert 2.0 == told["decision_seconds_count", ()]
    assert 1.0 == told["requests_held", ()]
    assert 3.0 == told["requests_in_flight", (("replica", "r0"),)]
    assert 1.0 == told["replica_up", (("replica", "r0"),)]


def test_windows_tell_utility_regret_drift_and_the_twin_s_error(metrics):
    metrics.settled(settled())
    metrics.now[0] += 7.0
    told = samples(metrics)

    assert 0.8 == told["window_utility", ()]
    assert 0.05 == told["window_regret", ()]
    assert told["window_regret_high", ()] != told["window_regret_high", ()]
    assert 0.05 == told["regret_sum_total", ()]
    assert 1.0 == told["drift_alarms_total", (("detector", "reward"),)]
    assert 0.0 == told["drift_alarms_total", (("detector", "twin"),)]
    assert -0.1 == pytest.approx(told["twin_error", (("metric", "ttft_mean_s"),)])
    assert 7.0 == told["window_age_seconds", ()]


def test_synthesis_is_counted_with_its_cost(metrics):
    metrics.synthesized(synthesis())
    metrics.synthesized(synthesis("the worker died"))
    told = samples(metrics)

    assert 1.0 == told["synthesis_cycles_total", (("outcome", "promoted"),)]
    assert 1.0 == told["synthesis_cycles_total", (("outcome", "failed"),)]
    assert 4.0 == told["synthesis_candidates_total", (("gate", "race"),)]
    assert 0.5 == told["synthesis_cost_usd_total", ()]
    assert 1000.0 == told["synthesis_tokens_total", ()]


def test_only_arms_that_serve_have_a_share(metrics):
    shares = {
        dict(labels)["arm"]: value
        for (name, labels), value in samples(metrics).items()
        if name == "allocation_share"
    }

    assert {"gen-kv-aware": 0.75, "round-robin": 0.25} == shares


def test_a_store_that_fails_is_counted(metrics):
    metrics.store_failed()

    assert 1.0 == samples(metrics)["store_errors_total", ()]


def test_openmetrics_is_told_to_who_asks_for_it(metrics):
    body, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")

    assert body.endswith(b"# EOF\n")
    assert content_type.startswith("application/openmetrics-text")


def test_the_sandbox_is_told_as_doctor_says_it(metrics):
    reached, _ = probe()
    for level in (Isolation.RLIMITS, reached):
        metrics.isolated(level)
    told = {key: value for key, value in samples(metrics).items() if "isolation" in key[0]}

    assert {("sandbox_isolation_level", (("level", str(reached)),)): reached.level} == told
    (finding,) = [f for f in examine() if f.what == "isolation for slow functions"]
    assert finding.detail.startswith(f"{reached}, ")


def test_faults_of_arms_are_counted_and_no_others(metrics):
    faults = (Fault("a", 2, "x"), Fault("b", 1, "y"), Fault("", 5, "replica r0 is away"))
    metrics.saw(replace(batch(), faults=faults))

    assert 3.0 == samples(metrics)["arm_faults_total", ()]


def test_the_dashboard_asks_only_for_what_is_exposed_and_for_all_of_it(metrics):
    metrics.saw(batch())
    metrics.settled(settled())
    metrics.synthesized(synthesis())
    metrics.isolated(Isolation.FULL)
    exposed = {}
    for family in text_string_to_metric_families(metrics.exposition("")[0].decode()):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"\b(?:autopoiesis|process)_\w+", target["expr"]))
            labels = set(re.findall(r"by \(([\w, ]+)\)", target["expr"]))
            labels = {x.strip() for each in labels for x in each.split(",")}
            labels |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert names, target
            assert names <= exposed.keys(), names - exposed.keys()
            assert labels <= set().union(*(exposed[name] for name in names)), target
            asked |= names
    left_out = {
        name
        for name in exposed
        if name.startswith("autopoiesis_")
        and name not in asked
        and not name.endswith(("_sum", "_count", "_created", "build_info"))
    }

    assert set() == left_out


def test_the_control_port_tells_metrics_of_a_running_controller(tmp_path):
    with controlled(tmp_path, window_s=600.0) as running:
        answer = running.client.get("/metrics")

    assert 200 == answer.status_code
    told = parsed(answer.text)
    assert 1.0 == pytest.approx(
        sum(value for (name, _), value in told.items() if name == "allocation_share")
    )
    assert 0.0 <= told["window_age_seconds", ()] < 60.0
