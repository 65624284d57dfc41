"""One cycle by hand: on a trace, on stored windows, through a model, and again from its record."""

import json
import math
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from controller_process import controlled
from gateway_process import post, run, serving, wait_until
from scripted_endpoint import GOOD, PROSE, ScriptedEndpoint, fenced, says

from autopoiesis.arms.language import verify
from autopoiesis.telemetry.records import RequestRecord, Status, WindowRow
from autopoiesis.telemetry.store import Store

TRACES = Path(__file__).parents[2] / "traces"
CODE = str(TRACES / "azure2023_code_a.parquet")
BUSY = ("--trace", CODE, "--speed", "10", "--for", "120", "--window", "10")
KEYS = {
    "trigger",
    "synthesizer",
    "candidates",
    "promoted",
    "seconds",
    "cpu_seconds",
    "tokens",
    "cost_usd",
}
CANDIDATE_KEYS = {"id", "verdict", "gate", "gain", "gain_low", "gain_high"}
KEY = "sk-test-0123456789abcdef"
WINDOW_S = 5.0


def config(folder: Path, url: str, **settings) -> str:
    """Write a configuration that has a model write."""
    lines = ['synthesizer = "openai"', *(f"{name} = {value}" for name, value in settings.items())]
    lines += ["[llm]", f'base_url = "{url}"', 'models = ["small"]', 'api_key_env = "TEST_LLM_KEY"']
    lines += ["[llm.prices]", "small = [1.0, 4.0]"]
    (folder / "config.toml").write_text("\n".join(lines))
    return "config.toml"


def secret_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_cycle_on_a_trace_ends_in_a_promoted_or_honestly_refused_candidate(tmp_path):
    code, out, errors = run(
        "synthesize", *BUSY, "--budget-seconds", "10", "--json", "-", cwd=tmp_path
    )
    report = json.loads(out)

    assert 0 == code, errors
    assert set(report) >= KEYS
    assert all(set(candidate) >= CANDIDATE_KEYS for candidate in report["candidates"])
    assert ("genetic", 0, 0.0) == (report["synthesizer"], report["tokens"], report["cost_usd"])
    promoted = [c["id"] for c in report["candidates"] if c["verdict"] == "promoted"]
    assert promoted == report["promoted"]
    assert report["conclusion"].startswith(("Promoted with a gain", "Nothing promoted"))
    assert all(c["reason"] for c in report["candidates"])
    assert not (tmp_path / ".autopoiesis").exists()


def test_a_model_writes_and_the_record_repeats_its_cycle(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    with ScriptedEndpoint(says(fenced(GOOD)), says(PROSE)) as endpoint:
        arguments = (*BUSY, "--config", config(tmp_path, endpoint.url), "--json", "-")
        code, out, errors = run("synthesize", *arguments, cwd=tmp_path)
    report = json.loads(out)

    assert 0 == code, errors
    assert ("openai", [verify(GOOD).id]) == (
        report["synthesizer"],
        [c["id"] for c in report["candidates"] if c["id"]],
    )
    assert report["tokens"] == 1200 * len(endpoint.bodies)
    assert math.isclose(0.0018 * len(endpoint.bodies), report["cost_usd"])
    assert "answered without a policy" in report["conclusion"]
    assert [] == secret_in(tmp_path)

    (record,) = (tmp_path / ".autopoiesis" / "synthesis" / "exchanges").iterdir()
    code, out, errors = run(
        "synthesize", "--replay-exchange", str(record), "--json", "-", cwd=tmp_path
    )
    assert 0 == code, errors
    assert "to the last digit" in errors
    assert json.loads(out)["candidates"] == report["candidates"]

    lines = record.read_text().splitlines()
    end = json.loads(lines[-1])
    end["row"]["candidates"][0]["gain"] = 0.5
    record.write_text("\n".join([*lines[:-1], json.dumps(end)]))
    code, _, errors = run(
        "synthesize", "--replay-exchange", str(record), "--json", "-", cwd=tmp_path
    )
    assert (1, True) == (code, "differ from those of the record" in errors)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--trace", CODE, "--windows", "5"), 2, "one of"),
        (("--trace", "nowhere.parquet"), 2, "nowhere.parquet"),
        (("--trace", CODE, "--for", "3"), 2, "too few requests"),
        (("--trace", CODE, "--synthesizer", "none"), 2, "writes nothing"),
        (("--trace", CODE, "--synthesizer", "oracle"), 2, "synthesizer"),
        (("--trace", CODE, "--synthesizer", "fleet"), 2, "none runs here"),
        (("--trace", CODE, "--budget-seconds", "0"), 2, "synthesis_budget_s"),
        (("--trace", CODE, "--config", "secret.toml"), 2, "api_key_env"),
        (("--trace", CODE, "--config", "typo.toml"), 2, "budget_usd_per_day"),
        (("--windows", "2"), 2, "at least 3"),
        ((), 3, "telemetry"),
        (("--replay-exchange", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("--replay-exchange", "typo.toml"), 2, "no recorded exchanges"),
    ],
)
def test_bad_input_gets_one_sentence_and_its_exit_code(tmp_path, arguments, code, word):
    (tmp_path / "secret.toml").write_text('[llm]\napi_key_env = "sk-my-secret-key"\n')
    (tmp_path / "typo.toml").write_text("[llm]\nbudget_dollars = 3\n")
    got, _, errors = run("synthesize", *arguments, cwd=tmp_path)

    assert (code, True) == (got, word in errors), errors
    assert "Traceback" not in errors
    assert "sk-my-secret-key" not in errors


def stored_request(number: int, arrived_s: float, rng: np.random.Generator) -> RequestRecord:
    return RequestRecord(
        id=f"r{number}", arrived_s=arrived_s, path="/v1/chat/completions", model="m",
        status=Status.COMPLETED, http_status=200, arm_id="", window=-1, shard=number % 64, session=0,
        replica=f"replica-{number % 2}", attempts=1, stream=True,
        input_tokens=int(rng.lognormal(7.0, 0.8)) + 1, output_tokens=int(rng.lognormal(4.5, 0.6)) + 1,
        max_output_tokens=1024, cached_tokens=0, usage_counted=True, priority_class=0.0, held_s=0.0,
        decision_s=0.001, ttft_s=0.2, e2e_s=1.0,
    )  # fmt: skip


def stopped_instance(folder: Path, windows: int) -> Path:
    """Write what an instance would have left behind that served two busy replicas."""
    rng, start_s = np.random.default_rng(3), time.time() - 1000.0
    data_dir = folder / ".autopoiesis"
    data_dir.mkdir()
    blank = WindowRow(0, 0.0, 0.0, {}, {}, 0, 0, 0, 0, 0.0, *[None] * 4, 0.0, *[None] * 4, "", 0.0)
    with Store.open(data_dir / "telemetry.duckdb") as store:
        for i in range(windows):
            from_s = start_s + i * WINDOW_S
            arrivals = np.sort(rng.uniform(from_s, from_s + WINDOW_S, 150))
            row = replace(
                blank, window=i, started_s=from_s, ended_s=from_s + WINDOW_S, requests=150
            )
            store.write_window(
                row, requests=[stored_request(150 * i + k, t, rng) for k, t in enumerate(arrivals)]
            )
    return data_dir


def test_a_cycle_on_stored_windows_is_kept_in_their_telemetry(tmp_path):
    stopped_instance(tmp_path, 8)
    arguments = (
        "--windows",
        "6",
        "--budget-seconds",
        "10",
        "--slo-ttft",
        "0.3",
        "--slo-tpot",
        "0.02",
    )
    settings = tmp_path / "two.toml"
    settings.write_text("simulate = 2\n")
    code, out, errors = run(
        "synthesize", *arguments, "--config", "two.toml", "--json", "-", cwd=tmp_path
    )
    report = json.loads(out)

    assert 0 == code, errors
    assert "windows up to 7" in report["trigger"]
    assert "Written to" in errors
    query = "select synthesizer, candidates, (select count(*) from candidates) from syntheses"
    code, out, _ = run("sql", query, "--format", "json", cwd=tmp_path)
    count = len(report["candidates"])
    assert (0, ["genetic", count, count]) == (code, list(json.loads(out)[0].values()))
    code, out, _ = run("arms", "list", "--json", "-", cwd=tmp_path)
    bred = {arm["id"]: arm["state"] for arm in json.loads(out) if arm["origin"] != "human"}
    assert bred == dict.fromkeys(report["promoted"], "candidate")

    with controlled(tmp_path, window_s=600.0, simulate=2) as running:
        code, out, errors = run(
            "synthesize", "--windows", "6", "--budget-seconds", "3", "--json", "-", cwd=tmp_path
        )
        assert 0 == code, errors
        assert "Written to the telemetry as synthesis 1." in errors
        rows = running.rows("select synthesis, candidates, since_window from syntheses")
        assert [1, len(json.loads(out)["candidates"]), None] == rows[1]


def test_too_few_stored_windows_are_refused(tmp_path):
    stopped_instance(tmp_path, 2)
    code, _, errors = run("synthesize", "--json", "-", cwd=tmp_path)

    assert (2, True) == (code, "2 stored windows" in errors), errors


@pytest.mark.slow
def test_a_model_writes_arms_while_the_gateway_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    body = json.dumps(
        {
            "model": "simulated",
            "max_tokens": 20,
            "messages": [{"role": "user", "content": "x" * 4000}],
        }
    ).encode()
    with ScriptedEndpoint(says(fenced(GOOD)), says(PROSE)) as endpoint:
        settings = config(
            tmp_path, endpoint.url, slo_ttft_s=0.02, slo_tpot_s=0.001, synthesis_cooldown_s=2.0,
            synthesis_budget_s=30.0, target_utility=1.0, window_s=1.0,
        )  # fmt: skip
        with serving(tmp_path, "--config", settings, "--simulate", "2") as gateway:

            def written() -> bool:
                for _ in range(3):
                    post(f"{gateway.url}/v1/chat/completions", body)
                return any(e["subject"] == "openai" for e in gateway.status()["events"])

            wait_until(written, 150.0)
            told = [e["message"] for e in gateway.status()["events"] if e["subject"] == "openai"]
            with urllib.request.urlopen(f"http://127.0.0.1:{gateway.control_port}/spare") as answer:
                spare = json.load(answer)
            query = "select synthesizer, tokens > 0, cost_usd > 0 from syntheses"
            code, out, _ = run("sql", query, "--format", "json", cwd=tmp_path)
            assert (0, ["openai", True, True]) == (code, list(json.loads(out)[0].values()))
            assert not any(KEY in " ".join(p.cmdline()) for p in gateway.processes())
    assert "openai says: small answered without a policy" in told[0] or "Promoted" in told[0]
    assert (False, "") == (spare["idle"], spare["replica"])
    assert "simulated" in spare["why"]
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert [] == secret_in(tmp_path)
