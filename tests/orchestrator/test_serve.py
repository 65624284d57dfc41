import json
import resource
import secrets
import signal
import socket
import threading
import time

import duckdb
import httpx
import openai
import psutil
import pytest
from gateway_process import post, run, serving, wait_until

from autopoiesis.gateway.settings import SESSION_HEADER
from autopoiesis.replicas.fleet import free_ports

MESSAGES = [{"role": "user", "content": "Tell me of the sea."}]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text("simulate = 4\n")
    return file


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, config):
    directory = tmp_path_factory.mktemp("serve")
    with serving(directory, "--window", "2", "--config", str(config)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_plain_answer(client):
    answer = client.chat.completions.create(model="simulated", messages=MESSAGES, max_tokens=12)

    assert 12 == answer.usage.completion_tokens
    assert answer.choices[0].message.content


def test_streamed_answer_comes_token_by_token_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="simulated",
            messages=MESSAGES,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 6
    assert 12 == chunks[-1].usage.completion_tokens


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "messages"),
        (b'{"model":"simulated","messages":3}', "messages"),
    ],
)
def test_malformed_body_is_refused_in_openai_shape(gateway, body, word):
    status, answer = post(f"{gateway.url}/v1/chat/completions", body)

    assert 400 == status
    assert word in json.loads(answer)["error"]["message"]


def test_body_of_50_mb_is_refused(gateway):
    status, answer = post(f"{gateway.url}/v1/chat/completions", b" " * 50_000_000)

    assert 413 == status
    assert "32 MiB" in json.loads(answer)["error"]["message"]


def test_unknown_model_is_refused(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nothing", messages=MESSAGES)


def test_on_hangup_the_settings_of_the_gateway_are_read_again(gateway, config, tmp_path):
    def status():
        return post(f"{gateway.url}/v1/chat/completions", b"{}")[0]

    before = config.read_text()
    keys = tmp_path / "keys"
    keys.write_text("alice alice-secret-0123456789\n")
    keys.chmod(0o600)
    config.write_text(f'{before}[gateway]\napi_keys = "{keys}"\n')
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: 401 == status(), 20)

    config.write_text(f"{before}[gateway]\napi_keys = 1\n")
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "stay as they were" in (gateway.folder / "serve.log").read_text(), 20)
    assert 401 == status()

    config.write_text(before)
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: 400 == status(), 20)


def test_telemetry_tells_of_requests_windows_and_arms_while_serving(gateway, client):
    for _ in range(5):
        client.completions.create(model="simulated", prompt="the sea " * 40, max_tokens=4)
    wait_until(lambda: any(w["requests"] for w in gateway.status()["windows"]), 30)
    count = run(
        "sql",
        "select count(*) as n from requests where status = 'completed'",
        "--format",
        "json",
        cwd=gateway.folder,
    )
    arms = run("arms", "list", "--json", "-", cwd=gateway.folder)

    assert json.loads(count[1])[0]["n"] >= 5
    rows = json.loads(arms[1])
    keys = {
        "id",
        "name",
        "origin",
        "state",
        "parents",
        "created_at",
        "traffic_share",
        "utility",
        "reason",
        "kind",
    }
    assert all(set(row) == keys for row in rows)
    assert len([row for row in rows if row["origin"] == "human"]) >= 4
    assert 1.0 == pytest.approx(sum(row["traffic_share"] for row in rows))


def test_data_directory_of_a_running_instance_is_refused(gateway):
    port, control = free_ports(2)
    code, _, errors = run(
        "serve", "--port", str(port), "--control-port", str(control), cwd=gateway.folder
    )

    assert 3 == code
    assert "belongs to a running instance" in errors


def test_telemetry_from_the_future_is_refused_in_a_sentence_and_left_alone(tmp_path):
    file = tmp_path / ".autopoiesis" / "telemetry.duckdb"
    file.parent.mkdir()
    with duckdb.connect(str(file)) as connection:
        connection.execute("create table meta as select 99 as schema_version")
    before = file.read_bytes()
    port, control_port = free_ports(2)
    ports = ("--port", str(port), "--control-port", str(control_port))
    code, _, errors = run("serve", *ports, cwd=tmp_path)

    assert 3 == code
    assert "schema version 99" in errors
    assert "upgrade autopoiesis" in errors
    assert "Traceback" not in errors
    assert before == file.read_bytes()


def test_taken_port_is_refused(gateway, tmp_path):
    code, _, errors = run("serve", "--port", str(gateway.port), cwd=tmp_path)

    assert 3 == code
    assert "give another port with --port" in errors


def test_killed_picker_loses_no_request(gateway, client):
    failures, answered = [], []

    def ask():
        while not done.is_set():
            try:
                client.chat.completions.create(model="simulated", messages=MESSAGES, max_tokens=4)
                answered.append(time.monotonic())
            except openai.OpenAIError as error:
                failures.append(error)

    done = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    (picker,) = gateway.running("gateway.picker")
    picker.kill()
    killed = time.monotonic()
    try:
        wait_until(lambda: has_new_picker(gateway, picker.pid), 60)
        time.sleep(1.0)
    finally:
        done.set()
        for thread in threads:
            thread.join()

    assert [] == failures
    assert len([t for t in answered if t > killed]) > 10


def has_new_picker(gateway, old_pid):
    others = [p for p in gateway.running("gateway.picker") if p.pid != old_pid]
    return others and (gateway.folder / ".autopoiesis/run/picker.sock").exists()


def test_killed_controller_comes_back_and_goes_on_counting_windows(gateway):
    wait_until(lambda: gateway.status()["windows"], 30)
    before = gateway.status()["window"]
    gateway.running("orchestrator.controller")[0].kill()
    wait_until(lambda: came_back(gateway, before), 90)

    assert gateway.status()["window"] > before


def came_back(gateway, before):
    try:
        return (gateway.status()["window"] or 0) > before
    except OSError:
        return False


def test_nothing_that_was_said_is_ever_stored(gateway):
    """Prompts, answers, keys and names of sessions leave no trace in any file or table."""
    secret = f"canary{secrets.token_hex(12)}"
    spoken = {
        "model": "simulated",
        "messages": [{"role": "user", "content": f"{secret} {'tell me of the sea ' * 80}"}],
        "max_tokens": 3,
        "user": secret,
        "metadata": {"name": secret},
        "stop": [secret],
    }
    headers = {"Authorization": f"Bearer {secret}", SESSION_HEADER: secret, "Cookie": secret}
    bodies = [
        json.dumps(spoken),
        json.dumps(spoken | {"stream": True}),
        json.dumps(spoken | {"model": "nobody"}),
        json.dumps(spoken | {"messages": secret}),
        json.dumps({"model": "simulated", "prompt": f"{secret} " * 900, "max_tokens": 3}),
        f'{{"messages": [{{"content": "{secret}"',
    ]
    before = last_window(gateway)
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=30) as asking:
        codes = {
            asking.post(f"/v1/{path}?key={secret}", content=body).status_code
            for path in ("chat/completions", "completions")
            for body in bodies
        }
    assert {200, 400, 404} <= codes
    wait_until(lambda: last_window(gateway) > before + 2, 30)

    assert found_in(gateway, "simulated") >= {"telemetry.duckdb.wal", "requests"}
    assert set() == found_in(gateway, secret)


def last_window(gateway):
    return asked(gateway, "select max(window_id) from windows")[0][0] or 0


def asked(gateway, query):
    answer = httpx.post(
        f"http://127.0.0.1:{gateway.control_port}/sql", json={"query": query}, timeout=20
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["rows"]


def found_in(gateway, word):
    """Return the files that hold a word's bytes, and the tables that hold it in a value."""
    files = [path for path in gateway.folder.rglob("*") if path.is_file()]
    tables = [row[0] for row in asked(gateway, "select table_name from duckdb_tables()")]
    return {path.name for path in files if word.encode() in path.read_bytes()} | {
        table
        for table in tables
        if asked(gateway, f"select count(*) from {table} as t where t::varchar like '%{word}%'")[0][
            0
        ]
    }


def test_a_running_instance_is_reported_on(gateway):
    code, said, errors = run("report", "--out", "report.html", cwd=gateway.folder)

    assert (0, "") == (code, errors)
    assert "requests in" in said
    assert "<svg" in (gateway.folder / "report.html").read_text()


def test_a_full_disk_costs_no_request_and_no_window(gateway, client):
    """The limit on the size of the controller's files does what a full disk does."""
    controller = gateway.running("orchestrator.controller")[0].pid
    unlimited = resource.prlimit(controller, resource.RLIMIT_FSIZE)
    before = last_window(gateway)
    resource.prlimit(controller, resource.RLIMIT_FSIZE, (1, unlimited[1]))
    try:
        deadline = time.monotonic() + 60
        while not (waiting := metric(gateway, "windows_waiting")) >= 2:
            assert time.monotonic() < deadline
            answer = client.completions.create(model="simulated", prompt="the sea", max_tokens=2)
            assert 2 == answer.usage.completion_tokens
        assert asked(gateway, "select count(*) from windows")
    finally:
        resource.prlimit(controller, resource.RLIMIT_FSIZE, unlimited)

    wait_until(lambda: last_window(gateway) >= before + waiting, 30)
    assert controller == gateway.running("orchestrator.controller")[0].pid
    missing = (
        f"select count(*) from range({before}, (select max(window_id) from windows)::bigint) as r(w) "
        "where w not in (select window_id from windows)"
    )
    assert [[0]] == asked(gateway, missing)
    wait_until(lambda: asked(gateway, TOLD) != [], 30)
    assert metric(gateway, "store_errors_total") >= 2


TOLD = "select 1 from events where kind = 'telemetry' and message like 'windows are written again%'"


def metric(gateway, name):
    answer = httpx.get(f"http://127.0.0.1:{gateway.control_port}/metrics", timeout=20)
    return next(
        float(line.split()[1])
        for line in answer.text.splitlines()
        if line.startswith(f"autopoiesis_{name} ")
    )


def test_sigterm_leaves_no_process_and_no_socket(tmp_path):
    with serving(tmp_path, "--simulate", "2") as gateway:
        processes = gateway.processes()
        code = gateway.stop(signal.SIGTERM)

    assert 0 == code
    assert [] == psutil.wait_procs(processes, timeout=5)[1]
    assert not (tmp_path / ".autopoiesis/run").exists()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", gateway.port), timeout=1).close()


def test_second_start_after_kill_works_and_keeps_the_telemetry(tmp_path):
    with serving(tmp_path, "--simulate", "2", "--window", "1") as gateway:
        post(
            f"{gateway.url}/v1/completions",
            b'{"model":"simulated","prompt":"the sea","max_tokens":2}',
        )
        wait_until(lambda: any(w["requests"] for w in gateway.status()["windows"]), 30)
        processes = gateway.processes()
        gateway.process.kill()
        gateway.process.wait()
        assert [] == psutil.wait_procs(processes[1:], timeout=10)[1]
    stopped = run("sql", "select count(*) as n from requests", "--format", "json", cwd=tmp_path)
    with serving(tmp_path, "--simulate", "2", "--window", "1") as gateway:
        again = run("sql", "select count(*) as n from requests", "--format", "json", cwd=tmp_path)

    assert [{"n": 1}] == json.loads(stopped[1])
    assert [{"n": 1}] == json.loads(again[1])


def test_existing_servers_can_be_put_behind_the_gateway(gateway, tmp_path):
    addresses = [
        m["address"]
        for m in json.loads((gateway.folder / ".autopoiesis/run/fleet.json").read_text())
    ]
    replicas = [part for address in addresses[:2] for part in ("--replica", f"http://{address}")]
    with (
        serving(tmp_path, *replicas) as second,
        openai.OpenAI(base_url=f"{second.url}/v1", api_key="-") as client,
    ):
        answer = client.completions.create(model="simulated", prompt="the sea", max_tokens=3)

        assert 3 == answer.usage.completion_tokens
