"""What may die, dies: replicas, the picker, Envoy. Every test mends what it broke."""

import asyncio
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from stack import Answer, Stack, chat, running_stack, wait_until
from test_gateway import FIRST_REPLICA, Records, serving

from autopoiesis.gateway import envoy
from autopoiesis.gateway.settings import DataPlaneSettings
from autopoiesis.replicas.fleet import write_fleet
from autopoiesis.telemetry.records import Status


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


def test_a_dead_first_choice_costs_nothing_but_an_attempt(stack: Stack):
    records = Records(stack)
    with serving(stack, FIRST_REPLICA, "r0", "r1", "r2"):
        # Now and then the picker has noticed before the request comes, and nothing has to be tried twice.
        attempts = (attempts_after_a_kill(stack, records, str(n)) for n in range(5))
        assert next((n for n in attempts if n > 1), 1) == 2


def attempts_after_a_kill(stack: Stack, records: Records, name: str) -> int:
    assert stack.post(chat()).headers["x-served-by"] == "r0"
    before = stack.log("picker").count("r0 is away")
    stack.kill("r0")
    try:
        answer = stack.post(chat(), headers={"x-request-id": f"retried-{name}"})
        assert (answer.status, answer.headers["x-served-by"]) == (200, "r1")
        (record,) = records.of(f"retried-{name}")
        assert (record.status, record.replica) == (Status.COMPLETED, "r1")
        wait_until(lambda: stack.log("picker").count("r0 is away") > before)
        again = stack.post(chat(), headers={"x-request-id": f"avoided-{name}"})
        assert again.headers["x-served-by"] == "r1"
        assert records.of(f"avoided-{name}")[0].attempts == 1
    finally:
        stack.start_upstream(stack.members[0])
    wait_until(lambda: stack.log("picker").count("r0 is back") > before)
    wait_until(lambda: stack.post(chat()).headers["x-served-by"] == "r0")
    return record.attempts


def test_a_replica_killed_under_load_loses_no_request(stack: Stack):
    with load(stack) as results:
        time.sleep(0.3)
        stack.kill("r2")
        time.sleep(0.7)
    stack.start_upstream(stack.members[2])
    wait_until(lambda: stack.listens(stack.members[2]))
    assert len(results) >= 4
    assert set(results) == {200}


def test_a_stream_without_a_token_is_not_lost_with_its_replica(stack: Stack):
    answers: list[Answer] = []
    ask = chat(stream=True, test={"first_s": 1.0})  # the headers come at once

    def wait() -> None:
        answers.append(stack.post(ask, headers={"x-request-id": "in-prefill"}))

    records = Records(stack)
    with serving(stack, FIRST_REPLICA, "r0", "r1", "r2"):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        stack.kill("r0")
        thread.join()
    stack.start_upstream(stack.members[0])
    wait_until(lambda: stack.listens(stack.members[0]))
    (answer,) = answers
    assert (answer.status, answer.headers["x-served-by"]) == (200, "r1")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    (record,) = records.of("in-prefill")
    assert (record.status, record.attempts, record.replica) == (Status.COMPLETED, 2, "r1")
    assert record.ttft_s == pytest.approx(1.5, abs=0.45)


def test_a_frozen_replica_gets_hardly_any_new_requests(stack: Stack):
    with load(stack) as results:
        time.sleep(0.3)
        stack.processes["r1"].send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.5)
            before = len(results)
            time.sleep(1.0)
            assert len(results) - before >= 4  # at most a few clients wait for it
        finally:
            stack.processes["r1"].send_signal(signal.SIGCONT)
    assert set(results) == {200}


def test_the_picker_killed_under_load_loses_no_request(stack: Stack):
    with serving(stack, FIRST_REPLICA, "r1") as arm_id:
        with load(stack) as results:
            time.sleep(0.3)
            stack.kill("picker")
            time.sleep(0.5)
            before = len(results)
            assert "x-autopoiesis-arm" not in stack.post(chat()).headers
            stack.start_picker()
            wait_until(lambda: stack.post(chat()).headers.get("x-autopoiesis-arm") == arm_id)
        assert before >= 4
        assert set(results) == {200}
        assert stack.post(chat()).headers["x-served-by"] == "r1"  # the allocation came back with it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stream_outlives_the_picker_that_decided_on_it(stack: Stack, number: int):
    ask = json.dumps(chat(stream=True, max_tokens=30, test={"each_s": 0.1}))
    with closing(http.client.HTTPConnection("127.0.0.1", stack.port, timeout=30)) as connection:
        connection.request("POST", "/v1/chat/completions", ask)
        answer = connection.getresponse()
        assert answer.headers["x-autopoiesis-arm"]
        assert answer.read(20)
        stack.kill("picker", number)
        assert answer.read().endswith(b"data: [DONE]\n\n")
    stack.start_picker()
    wait_until(lambda: "x-autopoiesis-arm" in stack.post(chat()).headers)


def test_a_frozen_picker_is_passed_over(stack: Stack):
    stack.processes["picker"].send_signal(signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        assert stack.post(chat()).status == 200
        assert time.monotonic() - started_s < 4.0
    finally:
        stack.processes["picker"].send_signal(signal.SIGCONT)


def test_envoy_learns_who_is_in_the_fleet(stack: Stack):
    def decided() -> set[str]:
        return {stack.post(chat()).headers["x-served-by"] for _ in range(6)}

    def passed_on() -> set[str]:
        return {stack.request("GET", "/health").headers["x-served-by"] for _ in range(6)}

    write_fleet(stack.run_dir / "fleet.json", stack.members[:1])
    try:
        wait_until(lambda: decided() == {"r0"})
        wait_until(lambda: passed_on() == {"r0"})
    finally:
        write_fleet(stack.run_dir / "fleet.json", stack.members)
    wait_until(lambda: len(decided()) > 1)
    wait_until(lambda: len(passed_on()) > 1)


def test_the_end_of_envoy_ends_what_was_in_flight(stack: Stack):
    stack.kill("envoy")
    stack.start_envoy()
    records = Records(stack)
    failure: list[BaseException] = []

    def slow() -> None:
        try:
            stack.post(chat(test={"first_s": 9.0}), headers={"x-request-id": "cut"})
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=slow)
    thread.start()
    stack.post(chat())
    time.sleep(0.3)
    stack.kill("envoy")
    thread.join()
    assert failure
    (record,) = records.of("cut")
    assert record.status is Status.ABORTED
    stack.start_envoy()
    assert stack.post(chat()).status == 200


def test_without_replicas_the_answer_is_a_clear_503(stack: Stack):
    for name in ("r0", "r1", "r2"):
        stack.kill(name)
    answer = stack.post(chat())
    assert answer.status == 503
    assert answer.json["error"]["message"].startswith("No replica can take the request")
    for member in stack.members:
        stack.start_upstream(member)
    wait_until(lambda: stack.post(chat()).status == 200)


def test_draining_waits_for_what_runs(stack: Stack):
    answers: list[int] = []
    slow = threading.Thread(
        target=lambda: answers.append(stack.post(chat(test={"first_s": 0.6})).status)
    )
    slow.start()
    time.sleep(0.2)
    assert not asyncio.run(envoy.drain(stack.run_dir, 0.05))
    assert asyncio.run(envoy.drain(stack.run_dir, 5.0))
    slow.join()
    assert answers == [200]
    stack.kill("envoy", signal.SIGTERM)
    stack.start_envoy()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_hangs_on_a_frozen_replica_is_answered_by_another(
    tmp_path: Path, stream: bool
):
    ask = chat(stream=stream, max_tokens=4)
    with running_stack(tmp_path, patience_s=0.5) as stack, serving(stack, FIRST_REPLICA, "r1"):
        for _ in range(4):
            assert stack.post(ask).headers["x-served-by"] == "r1"
        time.sleep(1.0)  # until the picker has looked at what is usual
        stack.processes["r1"].send_signal(signal.SIGSTOP)
        try:
            answer = stack.post(ask, headers={"x-request-id": "hung"})
        finally:
            stack.processes["r1"].send_signal(signal.SIGCONT)
        assert answer.status == 200
        assert answer.headers["x-served-by"] in {"r0", "r2"}
        (record,) = Records(stack).of("hung")
        assert (record.replica, record.attempts) == (answer.headers["x-served-by"], 2)
        assert "x-envoy" not in " ".join(answer.headers)


def test_a_stream_that_stalls_on_a_frozen_replica_ends(tmp_path: Path):
    settings = DataPlaneSettings(stall_timeout_s=1.5)
    slow = chat(stream=True, max_tokens=2, test={"first_s": 2.0})
    long = chat(stream=True, max_tokens=500, test={"each_s": 0.1})
    with (
        running_stack(tmp_path, settings=settings) as stack,
        serving(stack, FIRST_REPLICA, "r1"),
        closing(http.client.HTTPConnection("127.0.0.1", stack.port, timeout=30)) as connection,
    ):
        assert stack.post(slow).body.endswith(b"[DONE]\n\n")  # its replica is only slow
        headers = {"x-request-id": "stalled"}
        connection.request("POST", "/v1/chat/completions", json.dumps(long), headers)
        answer = connection.getresponse()
        assert answer.read(20)
        stack.processes["r1"].send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        finally:
            stack.processes["r1"].send_signal(signal.SIGCONT)
        assert "1 streams that stalled on r1" in stack.log("picker")
        (record,) = Records(stack).of("stalled")
    assert (record.status, record.replica) == (Status.FAILED, "r1")
