"""What may die, dies: replicas, the picker, Envoy."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stack import Stack, chat, running_stack, wait_until
from test_gateway import FIRST_REPLICA, Records, serving

from autopoiesis.gateway import envoy
from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.fleet import write_fleet
from autopoiesis.telemetry.records import Status


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three replicas for tests that break something and mend it again."""
    with running_stack(tmp_path_factory.mktemp("fragile")) as running:
        yield running


@contextmanager
def load(stack: Stack, clients: int = 4) -> Iterator[list[int | str]]:
    """Closed-loop clients for as long as the block runs; their statuses, or what failed."""
    results: list[int | str] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                results.append(stack.post(chat(test={"first_s": 0.005})).status)
            except OSError as error:
                results.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_dead_first_choice_costs_nothing_but_an_attempt(fragile: Stack):
    records = Records(fragile)
    with serving(fragile, FIRST_REPLICA, "r0", "r1", "r2"):
        assert fragile.post(chat()).headers["x-served-by"] == "r0"
        fragile.kill("r0")
        try:
            answer = fragile.post(chat(), headers={"x-request-id": "retried"})
            assert (answer.status, answer.headers["x-served-by"]) == (200, "r1")
            (record,) = records.of("retried")
            assert (record.status, record.attempts, record.replica) == (Status.COMPLETED, 2, "r1")
            wait_until(lambda: "r0 is away" in fragile.log("picker"))
            again = fragile.post(chat(), headers={"x-request-id": "avoided"})
            assert again.headers["x-served-by"] == "r1"
            assert records.of("avoided")[0].attempts == 1
        finally:
            fragile.start_upstream(fragile.members[0])
        wait_until(lambda: "r0 is back" in fragile.log("picker"))
        wait_until(lambda: fragile.post(chat()).headers["x-served-by"] == "r0")


def test_a_replica_killed_under_load_loses_no_request(fragile: Stack):
    with load(fragile) as results:
        time.sleep(0.3)
        fragile.kill("r2")
        time.sleep(0.7)
    fragile.start_upstream(fragile.members[2])
    wait_until(lambda: fragile.listens(fragile.members[2]))
    assert len(results) > 20
    assert set(results) == {200}


def test_the_picker_killed_under_load_loses_no_request(fragile: Stack):
    with serving(fragile, FIRST_REPLICA, "r1") as arm_id:
        with load(fragile) as results:
            time.sleep(0.3)
            fragile.kill("picker")
            time.sleep(0.5)
            before = len(results)
            assert "x-autopoiesis-arm" not in fragile.post(chat()).headers
            fragile.start_picker()
            wait_until(lambda: fragile.post(chat()).headers.get("x-autopoiesis-arm") == arm_id)
        assert before > 20
        assert set(results) == {200}
        assert (
            fragile.post(chat()).headers["x-served-by"] == "r1"
        )  # the allocation came back with it
        assert Records(fragile)


def test_a_frozen_picker_is_passed_over(fragile: Stack):
    fragile.processes["picker"].send_signal(signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        assert fragile.post(chat()).status == 200
        assert time.monotonic() - started_s < 4.0
    finally:
        fragile.processes["picker"].send_signal(signal.SIGCONT)


def test_envoy_learns_who_is_in_the_fleet(fragile: Stack):
    write_fleet(fragile.run_dir / "fleet.json", fragile.members[:1])

    def served() -> set[str]:
        return {fragile.post(chat()).headers["x-served-by"] for _ in range(6)}

    try:
        wait_until(lambda: served() == {"r0"})
        passed = {fragile.request("GET", "/health").headers["x-served-by"] for _ in range(6)}
        assert passed == {"r0"}
    finally:
        write_fleet(fragile.run_dir / "fleet.json", fragile.members)
    wait_until(lambda: len(served()) > 1)


def test_the_end_of_envoy_ends_what_was_in_flight(fragile: Stack):
    fragile.kill("envoy")
    argv = envoy.prepare(fragile.run_dir, "127.0.0.1", fragile.port, fragile.members)
    fragile.start("envoy", argv)
    wait_until(lambda: asyncio.run(envoy.is_ready(fragile.run_dir)))
    records = Records(fragile)
    failure: list[BaseException] = []

    def slow() -> None:
        try:
            fragile.post(chat(test={"first_s": 9.0}), headers={"x-request-id": "cut"})
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=slow)
    thread.start()
    fragile.post(chat())
    time.sleep(0.3)
    fragile.kill("envoy")
    thread.join()
    assert failure
    (record,) = records.of("cut")
    assert record.status is Status.ABORTED
    fragile.start("envoy", argv)
    wait_until(lambda: asyncio.run(envoy.is_ready(fragile.run_dir)))
    assert fragile.post(chat()).status == 200


def test_without_replicas_the_answer_is_a_clear_503(fragile: Stack):
    for name in ("r0", "r1", "r2"):
        fragile.kill(name)
    answer = fragile.post(chat())
    assert answer.status == 503
    assert answer.json["error"]["message"].startswith("No replica can take the request")
    for member in fragile.members:
        fragile.start_upstream(member)
    wait_until(lambda: fragile.post(chat()).status == 200)


def test_draining_waits_for_what_runs(fragile: Stack):
    answers: list[int] = []
    slow = threading.Thread(
        target=lambda: answers.append(fragile.post(chat(test={"first_s": 0.6})).status)
    )
    slow.start()
    time.sleep(0.2)
    assert not asyncio.run(envoy.drain(fragile.run_dir, 0.05))
    assert asyncio.run(envoy.drain(fragile.run_dir, 5.0))
    slow.join()
    assert answers == [200]
    fragile.kill("picker", signal.SIGTERM)
    assert RunDir(fragile.run_dir).allocation.exists()
