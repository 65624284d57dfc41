import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from gateway_process import run
from typer.testing import CliRunner

from autopoiesis.arms.sandbox.process import probe
from autopoiesis.cli import app
from autopoiesis.replicas.fleet import free_ports
from autopoiesis.twin.trace import read_trace, write_trace

TRACES = Path(__file__).parents[2] / "traces"
RESULT_KEYS = {
    "policy", "kind", "utility", "goodput", "completed", "shed", "failed", "ttft_p50_s", "ttft_p99_s",
    "tpot_p50_s", "tpot_p99_s", "e2e_mean_s", "e2e_p99_s", "replica_seconds",
}  # fmt: skip
REPORT_KEYS = {
    "trace", "requests", "duration_s", "windows", "seed", "replicas", "profile", "objective",
    "simulated_requests_per_s", "best_human", "arms_created", "results",
}  # fmt: skip


def test_replay_prints_the_keys_of_the_contract_for_every_arm_and_online(tmp_path):
    trace = str(TRACES / "azure2023_code_a.parquet")
    code, out, _ = run("replay", trace, "--speed", "4", "--for", "60", "--json", "-", cwd=tmp_path)
    report = json.loads(out)

    assert 0 == code
    assert set(report) == REPORT_KEYS
    assert all(set(result) == RESULT_KEYS for result in report["results"])
    kinds = [result["kind"] for result in report["results"]]
    assert kinds.count("human") >= 4
    assert {"online", "oracle"} < set(kinds)
    best = max((r for r in report["results"] if r["kind"] == "human"), key=lambda r: r["utility"])
    assert best["policy"] == report["best_human"]


def test_replay_runs_everyone_under_the_losses_of_a_capacity_trace(tmp_path):
    (tmp_path / "spot.csv").write_text("t_s,nodes\n0,4\n100,2\n")
    trace = str(TRACES / "azure2023_conv_a.parquet")
    arguments = ("--speed", "5", "--for", "60", "--capacity", "spot.csv", "--arm", "random")
    code, out, _ = run("replay", trace, *arguments, "--json", "-", cwd=tmp_path)
    report = json.loads(out)

    assert 0 == code
    assert set(report) == REPORT_KEYS
    for result in report["results"]:
        assert set(result) == RESULT_KEYS
        assert 4 * 20 + 2 * 39 < result["replica_seconds"] < 4 * 20 + 2 * 60


def test_traces_info_describes_a_capacity_trace(tmp_path):
    trace = str(TRACES / "spot_gcp_a100.parquet")
    code, out, _ = run("traces", "info", trace, "--json", "-", cwd=tmp_path)

    assert 0 == code
    told = json.loads(out)
    assert (told["nodes_min"], told["nodes_max"], told["largest_loss"]) == (17, 64, 36)


def test_replay_takes_a_profile_made_from_figures(tmp_path):
    trace = str(TRACES / "azure2023_conv_a.parquet")
    arguments = (
        "--profile",
        "l40s-qwen3-8b-tp1-fp8",
        "--for",
        "60",
        "--arm",
        "random",
        "--no-online",
    )
    code, out, _ = run("replay", trace, *arguments, "--json", "-", cwd=tmp_path)

    assert 0 == code
    assert "l40s-qwen3-8b-tp1-fp8" == json.loads(out)["profile"]


def test_replay_takes_a_policy_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(request, replica, fleet):\n    return replica.in_flight / replica.speed\n"
    )
    trace = str(TRACES / "azure2023_code_a.parquet")
    arguments = ("--arm", "mine.py", "--arm", "random", "--no-online", "--for", "60", "--json", "-")
    code, out, _ = run("replay", trace, *arguments, cwd=tmp_path)

    assert 0 == code
    assert {"mine", "random", "oracle"} == {
        result["policy"] for result in json.loads(out)["results"]
    }


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("serve", "--replica", "ftp://x", "--port", "1"), 3, "http://"),
        (("serve", "--replica", "http://127.0.0.1:1"), 3, "127.0.0.1:1"),
        (("serve", "--profile", "abacus"), 2, "abacus"),
        (("serve", "--window", "-3"), 2, "window_s"),
        (("serve", "--replica", "http://127.0.0.1:1", "--simulate", "2"), 2, "one of"),
        (("serve", "--config", "nowhere.toml"), 2, "nowhere.toml"),
        (("serve", "--no-such-option",), 2, "no-such-option"),
        (("replay", "nowhere.parquet"), 2, "nowhere.parquet"),
        (("replay", "broken.jsonl"), 2, "line 2"),
        (("replay", str(TRACES / "azure2023_code_a.parquet"), "--arm", "nobody"), 2, "nobody"),
        (("replay", str(TRACES / "azure2023_code_a.parquet"), "--arm", "evil.py"), 2, "import"),
        (("sql", "select 1"), 3, "telemetry"),
        (("arms", "show", "nobody"), 2, "nobody"),
        (("traces", "info", "broken.jsonl"), 2, "line 2"),
        (("load", str(TRACES / "azure2023_code_a.parquet"), "--url", "http://127.0.0.1:1"), 3, "127.0.0.1:1"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_its_exit_code(tmp_path, arguments, code, word):
    first = '{"timestamp": 0, "input_length": 10, "output_length": 2, "hash_ids": [1]}'
    (tmp_path / "broken.jsonl").write_text(first + '\n{"timestamp": 27,\n')
    (tmp_path / "evil.py").write_text(
        "import os\ndef score(request, replica, fleet):\n    return 0\n"
    )
    if "--port" not in arguments and arguments[0] == "serve":
        port, control = free_ports(2)
        arguments = (*arguments, "--port", str(port), "--control-port", str(control))
    got, _, errors = run(*arguments, cwd=tmp_path)

    assert (code, True) == (got, word in errors), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("rows", "arguments", "says"),
    [
        ("0,2,2\n1,-2,2\n", (), "line 3: `ContextTokens` is -2"),
        ("", (), "no request in it"),
        ("nan,2,2\n", (), "line 2: `TIMESTAMP` is nan"),
        ("5,2,2\n1,2,2\n", (), "line 3: `TIMESTAMP` is earlier"),
        ("0,9000000,2\n1,8000000,2\n", (), "the shortest, request 2, has 8000002"),
        ("0,2,2\n", ("--profile", "h100-llama-3-70b-tp1-bf16"), "weights take 141.1 GB"),
        ("0,2,2\n", ("--for", "0"), "no request is left"),
        ("0,2,2\n", ("--capacity", "nowhere.csv"), "nowhere.csv: there is no such file"),
        ("0,2,2\n", ("--capacity", "trace.csv"), "is no capacity trace"),
        ("0,2,2\n", ("--capacity", "spot.csv"), "line 3: `nodes` is -1"),
    ],
)
def test_replay_refuses_what_it_cannot_run(tmp_path, monkeypatch, rows, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    (tmp_path / "spot.csv").write_text("t_s,nodes\n0,4\n1,-1\n")
    result = CliRunner().invoke(app, ["replay", "trace.csv", *arguments])

    assert (2, True) == (result.exit_code, says in result.stderr), result.output
    assert 1 == result.stderr.count("\n")


def test_replay_refuses_prefix_blocks_that_are_no_kv_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation = read_trace(TRACES / "mooncake_conversation_a.parquet").head(5)
    write_trace(replace(conversation, block_tokens=500), "odd.parquet")
    result = CliRunner().invoke(app, ["replay", "odd.parquet"])

    assert 2 == result.exit_code
    assert "prefix blocks of 500 tokens are not whole KV blocks of 16" in result.stderr


def test_no_directory_can_be_made_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("")
    port, control = free_ports(2)
    code, _, errors = run(
        "serve",
        "--data-dir",
        "file",
        "--port",
        str(port),
        "--control-port",
        str(control),
        cwd=tmp_path,
    )

    assert 3 == code
    assert "--data-dir" in errors


def test_settings_come_from_flags_then_environment_then_file(tmp_path, monkeypatch):
    from autopoiesis.orchestrator.settings import load_settings

    (tmp_path / "a.toml").write_text("port = 1111\nwindow_s = 3.0\nslo_ttft_s = 2.5\n")
    environment = {
        "AUTOPOIESIS_PORT": "2222",
        "AUTOPOIESIS_WINDOW_S": "4",
        "AUTOPOIESIS_PROFILE": "a100-llama-3-8b-tp1-bf16",
    }
    settings = load_settings(tmp_path / "a.toml", {"port": 3333, "window_s": None}, environment)

    assert (3333, 4.0, 2.5) == (settings.port, settings.window_s, settings.slo_ttft_s)
    assert ("a100-llama-3-8b-tp1-bf16",) == settings.profile


def test_doctor_finds_what_serving_needs(tmp_path):
    code, out, _ = run("doctor", "--json", "-", cwd=tmp_path)

    assert 0 == code
    findings = json.loads(out)
    assert all(finding["there"] for finding in findings if finding["needed"])
    (isolation,) = [f for f in findings if f["what"] == "isolation for slow functions"]
    assert isolation["detail"].startswith(f"{probe()[0]}, kernel ")


def test_a_port_in_use_by_another_program_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, errors = run("serve", "--port", str(taken.getsockname()[1]), cwd=tmp_path)

    assert 3 == code
    assert "--port" in errors
