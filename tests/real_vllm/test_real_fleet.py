"""Two real vLLM replicas, started, watched and killed by `serve`."""

import json
import signal
import threading
import urllib.request

import openai
import psutil
import pytest
from fleet_scene import MESSAGES, ended, rows, told, under_load
from gateway_process import post, run, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

ASKED = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(fleet):
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def addresses(fleet):
    members = json.loads((fleet.folder / ".autopoiesis/run/fleet.json").read_text())
    return {member["name"]: member["address"] for member in members}


def metric(address, name):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " "))
    )


def text_of(stream):
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_answers_are_those_of_the_replica(fleet, client):
    for address in addresses(fleet).values():
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="-") as replica:
            expected = replica.chat.completions.create(**ASKED)
            streamed = text_of(replica.chat.completions.create(**ASKED, stream=True))

    answer = client.chat.completions.create(**ASKED)

    assert expected.choices[0].message.content == answer.choices[0].message.content
    assert expected.usage == answer.usage
    assert streamed == text_of(client.chat.completions.create(**ASKED, stream=True))


def test_what_vllm_alone_knows_passes_through(fleet, client):
    answer = client.completions.create(model="tiny", prompt="one two", max_tokens=3, logprobs=2)
    assert 3 == len(answer.choices[0].logprobs.tokens)
    status, body = post(
        f"{fleet.url}/tokenize", json.dumps({"model": "tiny", "prompt": "one two"}).encode()
    )
    assert 200 == status
    assert json.loads(body)["count"] > 0


def test_errors_of_vllm_come_back_as_they_are(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="sea " * 3000, max_tokens=8)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nothing", messages=MESSAGES)


def test_arms_change_under_streams_and_none_is_cut(fleet):
    before = fleet.status()["window"]
    with under_load(fleet) as loads:
        wait_until(lambda: fleet.status()["window"] >= before + 5, 60)
    whole, cut, refused = ended(loads)

    assert whole > 0
    assert (0, []) == (cut, refused)
    code, out, _ = run(
        "sql",
        "--format",
        "json",
        "select count(distinct arm_id) as n from requests",
        cwd=fleet.folder,
    )
    assert 0 == code
    assert json.loads(out)[0]["n"] > 1


def test_an_abandoned_stream_frees_the_replica(fleet, client):
    stream = client.chat.completions.create(
        **ASKED | {"max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    running = [
        address
        for address in addresses(fleet).values()
        if metric(address, "vllm:num_requests_running")
    ]
    assert 1 == len(running)
    stream.close()
    wait_until(lambda: metric(running[0], "vllm:num_requests_running") == 0, 10)


def test_urgent_requests_go_first(fleet):
    """On busy replicas the engine's own queue is by priority, and the gateway passes it on."""
    code, _, errors = run("control", "allocate", "round-robin", cwd=fleet.folder)
    assert 0 == code, errors  # an arm without ceilings: nothing is held in the gateway
    order = []

    def ask(name, priority):
        body = ASKED | {"max_tokens": 250, "ignore_eos": True, "priority": priority}
        asked = urllib.request.Request(
            f"{fleet.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=600) as answer:
            answer.read()
        order.append(name)

    try:
        crowd = [threading.Thread(target=ask, args=("crowd", 5)) for _ in range(72)]
        for thread in crowd:
            thread.start()
        wait_until(lambda: waiting(fleet) > 8, 60)
        urgent = threading.Thread(target=ask, args=("urgent", -5))
        urgent.start()
        for thread in [*crowd, urgent]:
            thread.join(600)
    finally:
        run("control", "release", cwd=fleet.folder)
    assert order.index("urgent") < 60


def waiting(fleet):
    return sum(metric(a, "vllm:num_requests_waiting") for a in addresses(fleet).values())


def test_metrics_of_the_replicas_reach_the_telemetry(fleet):
    query = "select replica, max(running) as running, max(prefix_queries_total) as queries from replicas group by all"
    wait_until(
        lambda: len(json.loads(run("sql", "--format", "json", query, cwd=fleet.folder)[1])) == 2, 30
    )
    rows = json.loads(run("sql", "--format", "json", query, cwd=fleet.folder)[1])
    assert all(row["running"] > 0 and row["queries"] > 0 for row in rows)


def test_replicas_restart_with_other_limits_one_after_the_other_and_no_request_fails(fleet):
    with under_load(fleet, 3) as loads:
        code, _, errors = run(
            "control", "restart", "--max-num-seqs", "8", cwd=fleet.folder, timeout=800
        )
    whole, cut, refused = ended(loads)

    assert 0 == code, errors
    assert whole > 0
    assert (0, []) == (cut, refused)
    assert {8} == {r["max_num_seqs"] for r in told(fleet).values()}
    words = [process.cmdline() for process in fleet.running("api_server")]
    assert ["8", "8"] == [w[len(w) - w[::-1].index("--max-num-seqs")] for w in words]
    query = "select * from reconfigurations where action = 'restart' and error = ''"
    wait_until(lambda: len(rows(fleet, query)) == 2, 30)
    for change in rows(fleet, query):
        assert change["drain_s"] > 0
        assert change["import_s"] > 0
        assert change["load_s"] + change["engine_s"] > 0
        assert change["seconds"] > change["import_s"] + change["load_s"] + change["engine_s"]


def test_limits_with_which_vllm_does_not_start_are_taken_back(fleet):
    limits = ("--max-num-batched-tokens", "4")  # below max_num_seqs
    code, _, errors = run("control", "restart", "replica-0", *limits, cwd=fleet.folder, timeout=800)

    assert 1 == code
    assert "max_num_batched_tokens" in errors
    wait_until(lambda: told(fleet)["replica-0"]["standing"] == "ready", 600)
    assert 8 == told(fleet)["replica-0"]["max_num_seqs"]
    assert 4 != told(fleet)["replica-0"]["max_num_batched_tokens"]


def test_a_replica_sleeps_gets_nothing_and_serves_again_when_woken(fleet):
    with under_load(fleet, 3) as loads:
        code, _, errors = run("control", "sleep", "replica-1", cwd=fleet.folder)
        assert 0 == code, errors
        assert "asleep" == told(fleet)["replica-1"]["standing"]
        asleep = addresses(fleet)["replica-1"]
        with urllib.request.urlopen(f"http://{asleep}/is_sleeping", timeout=5) as answer:
            assert json.load(answer)["is_sleeping"]
        before = sum(load.whole for load in loads)
        wait_until(lambda: sum(load.whole for load in loads) > before + 6, 60)
        code, _, errors = run("control", "wake", "replica-1", cwd=fleet.folder)
        assert 0 == code, errors
        taken = metric(asleep, "vllm:prefix_cache_queries_total")
        wait_until(lambda: metric(asleep, "vllm:prefix_cache_queries_total") > taken, 60)
    _, cut, refused = ended(loads)
    assert (0, []) == (cut, refused)


def test_hits_that_were_expected_are_compared_with_those_that_vllm_counted(fleet):
    query = "select expected, observed, tokens from prefix_errors where tokens > 0"
    wait_until(lambda: rows(fleet, query), 30)
    for row in rows(fleet, query):
        assert 0.0 <= row["expected"] <= 1.0
        assert 0.0 <= row["observed"] <= 1.0


def test_the_twin_is_validated_on_what_was_recorded(fleet):
    code, out, errors = run(
        "twin",
        "validate",
        "--max-num-seqs",
        "16",
        "--json",
        "-",
        "--quiet",
        cwd=fleet.folder,
        timeout=300,
    )
    assert 0 == code, errors
    validation = json.loads(out)
    assert validation["requests"] > 50
    assert validation["median_error"]["ttft_s"] > 0.0


def test_a_killed_replica_loses_only_what_it_was_streaming_and_comes_back(fleet):
    with under_load(fleet) as loads:
        wait_until(lambda: sum(load.whole for load in loads) >= 6, 60)
        victim = min(fleet.running("api_server"), key=lambda process: process.pid)
        workers = victim.children(recursive=True)
        words = victim.cmdline()
        port = words[words.index("--port") + 1]
        name = next(n for n, address in addresses(fleet).items() if address.endswith(f":{port}"))
        victim.kill()
        before = sum(load.whole for load in loads)
        wait_until(lambda: sum(load.whole for load in loads) > before + 6, 60)
    _, cut, refused = ended(loads)
    assert [] == refused
    assert cut <= len(loads)
    psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in workers if worker.is_running()]
    wait_until(lambda: came_back(fleet, name), 300)


def came_back(fleet, name):
    events = fleet.status()["events"]
    return any(e["subject"] == name and "answers again" in e["message"] for e in events)


def test_stopping_leaves_no_process_behind(fleet):
    processes = fleet.processes()
    assert 0 == fleet.stop(signal.SIGTERM, timeout=90)
    psutil.wait_procs(processes, timeout=10)
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (fleet.folder / ".autopoiesis/run").exists()
