"""A running gateway whose fleet changes: by an operator's orders, and by a list that somebody else keeps."""

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gateway_process import run, serving, wait_until

from autopoiesis.replicas.fleet import Member, free_ports, simulated_command

PROFILE = "h100-llama-3-8b-tp1-bf16"
CONFIG = 'window_s = 2.0\nsynthesizer = "none"\ncell_replicas = 1\n'
BODY = {"model": "simulated", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 16}


class Asking:
    """Clients that ask one request after the other until they are told to stop."""

    def __init__(self, gateway, clients=3):
        self.url = gateway.url
        self.statuses = []
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._ask) for _ in range(clients)]

    def _ask(self):
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self._enough.wait(0.05):
                self.statuses.append(client.post("/v1/chat/completions", json=BODY).status_code)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._enough.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()


def rows(gateway, query):
    url = f"http://127.0.0.1:{gateway.control_port}/sql"
    return httpx.post(url, json={"query": query}, timeout=20).json()["rows"]


def fleet(gateway):
    url = f"http://127.0.0.1:{gateway.control_port}/fleet"
    return {r["replica"]: r for r in httpx.get(url, timeout=20).json()["replicas"]}


def messages(gateway):
    return [e["message"] for e in gateway.status()["events"]]


def test_a_rolling_restart_under_load_fails_nobody_and_is_written_down(tmp_path):
    (tmp_path / "serve.toml").write_text(CONFIG + "simulate = 2\n")
    with serving(tmp_path, "--config", "serve.toml") as gateway, Asking(gateway) as asking:
        wait_until(lambda: len(asking.statuses) > 20, 60)
        before = {p.pid for p in gateway.running("autopoiesis.replicas.simulated")}
        code, out, errors = run("control", "restart", "--max-num-seqs", "8", cwd=tmp_path)
        assert 0 == code, errors
        assert "8" in out
        served = len(asking.statuses)
        wait_until(lambda: len(asking.statuses) > served + 10, 30)
        after = {p.pid for p in gateway.running("autopoiesis.replicas.simulated")}
        assert (len(after), before & after) == (2, set())
        assert {r["max_num_seqs"] for r in fleet(gateway).values()} == {8}
        wait_until(
            lambda: rows(gateway, "select 1 from reconfigurations where max_num_seqs = 8"), 30
        )
        changes = rows(gateway, "select replica, action, error, seconds > 0 from reconfigurations")
        assert sorted(changes) == [[f"sim-{i}", "restart", "", True] for i in range(2)]
        code, _, refused = run("control", "stop", "sim-0", "sim-1", cwd=tmp_path)
        assert (2, True) == (code, "at least 1 must serve" in refused)
    assert set(asking.statuses) == {200}


def test_a_fleet_that_others_run_is_followed_and_lost_replicas_cost_nobody_an_answer(tmp_path):
    members = [
        Member(f"m{i}", f"127.0.0.1:{port}", PROFILE) for i, port in enumerate(free_ports(3))
    ]
    replicas = []
    for member in members:
        command = simulated_command(member)
        replicas.append(
            subprocess.Popen(
                command.argv, env=os.environ | command.environment, stderr=subprocess.DEVNULL
            )
        )
    names = [m.address.replace(":", "-") for m in members]
    listed = tmp_path / "fleet"
    listed.write_text(f"{members[0].url}\n{members[1].url}\n")
    (tmp_path / "serve.toml").write_text(CONFIG + "discover_s = 0.5\n")
    try:
        for member in members:
            wait_until(lambda member=member: answers(member), 60)
        arguments = ("--config", "serve.toml", "--fleet-file", "fleet")
        with serving(tmp_path, *arguments) as gateway, Asking(gateway) as asking:
            assert set(fleet(gateway)) == set(names[:2])
            listed.write_text("".join(f"{m.url}\n" for m in members))
            wait_until(lambda: f"{names[2]} has joined the fleet" in messages(gateway), 20)
            wait_until(lambda: serves(gateway, names[2]), 20)
            replicas[0].kill()  # without notice
            wait_until(lambda: not serves(gateway, names[0]), 10)
            listed.write_text(f"{members[1].url} leaving\n{members[2].url}\n")
            wait_until(lambda: not serves(gateway, names[1]), 20)
            told = messages(gateway)
            assert f"{names[1]} is about to leave; it gets nothing new" in told
            assert f"{names[0]} has left the fleet" in told
            wait_until(lambda: rows(gateway, "select 1 from windows where requests > 0"), 20)
        assert set(asking.statuses) == {200}
    finally:
        for replica in replicas:
            replica.send_signal(signal.SIGKILL)
            replica.wait()


def answers(member):
    try:
        return httpx.get(f"{member.url}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def serves(gateway, name):
    url = f"http://127.0.0.1:{gateway.control_port}/allocation"
    cells = httpx.get(url, timeout=20).json()["cells"]
    return any(name in cell["replicas"] for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("control", "restart", "--max-num-seqs", "0"), "max-num-seqs"),
        (("control", "restart"), "No instance runs"),
        (("serve", "--fleet-file", "none"), "No replica is there yet: The list of replicas none"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(tmp_path, arguments, says):
    code, _, errors = run(*arguments, cwd=tmp_path)
    assert code in {2, 3}
    assert says in errors
    assert "Traceback" not in errors
