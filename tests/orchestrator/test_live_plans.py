"""A slow policy stops and starts real processes of a running gateway, and no request fails for it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gateway_process import serving, wait_until

CONFIG = """
plan_control = "on"
slow_policy = "threshold"
simulate = 3
window_s = 2.0
synthesizer = "none"
"""
BODY = {"model": "simulated", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 16}


@pytest.mark.slow
def test_a_quiet_fleet_is_made_smaller_and_a_killed_controller_keeps_it_so(tmp_path):
    (tmp_path / "plans.toml").write_text(CONFIG)
    statuses: list[int] = []
    enough = threading.Event()

    with serving(tmp_path, "--config", "plans.toml") as gateway:

        def ask() -> None:
            with httpx.Client(base_url=gateway.url, timeout=30) as client:
                while not enough.wait(0.2):
                    statuses.append(client.post("/v1/chat/completions", json=BODY).status_code)

        def replicas() -> int:
            return len(gateway.running("autopoiesis.replicas.simulated"))

        def rows(query: str) -> list[list]:
            url = f"http://127.0.0.1:{gateway.control_port}/sql"
            return httpx.post(url, json={"query": query}, timeout=20).json()["rows"]

        with ThreadPoolExecutor() as pool:
            asking = [pool.submit(ask) for _ in range(2)]
            try:
                assert replicas() == 3
                wait_until(lambda: replicas() == 1, 60)
                wait_until(lambda: rows("select 1 from plans where outcome = 'applied'"), 30)
                (controller,) = gateway.running("autopoiesis.orchestrator.controller")
                controller.kill()
                windows = rows_after_restart(gateway, rows)
                wait_until(
                    lambda: rows(f"select 1 from windows where window_id > {windows + 2}"), 60
                )
                assert replicas() == 1
            finally:
                enough.set()
            for one in asking:
                one.result()
        costs = "stale_s, idle_replica_s, scheduling_s, cpu_s"
        (row,) = rows(f"select {costs} from plans where outcome = 'applied'")
        assert all(cost > 0.0 for cost in row)
        assert not rows("select 1 from events where kind = 'replica'")
    assert len(statuses) > 50
    assert set(statuses) == {200}


def rows_after_restart(gateway, rows) -> int:
    def answers() -> bool:
        try:
            return bool(rows("select 1 from windows"))
        except (httpx.TransportError, KeyError, ValueError):
            return False

    wait_until(answers, 120)
    return int(rows("select max(window_id) from windows")[0][0])
