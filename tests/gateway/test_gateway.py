"""Requests through real Envoy and a real picker to three healthy replicas."""

import asyncio
import http.client
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from stack import Stack, chat

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.link import Allocate, Batch, PickerLink
from autopoiesis.gateway.settings import RunDir
from autopoiesis.telemetry.records import ReplicaSample, RequestRecord, Status

FIRST_REPLICA = "def score(request, replica, fleet):\n    return replica.position\n"
ONE_AT_A_TIME = FIRST_REPLICA + "def ceiling(request, replica, fleet):\n    return 1\n"
FEWEST_REQUESTS = "def score(request, replica, fleet):\n    return replica.in_flight\n"
SHED_ALL = FIRST_REPLICA + "def admit(request, fleet):\n    return 0\n"


def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{stack.port}/v1", api_key="-", max_retries=0)


def allocation(source: str, *replicas: str) -> tuple[Allocation, dict[str, str]]:
    policy = verify(source)
    return Allocation(7, (Cell(policy.id, replicas, tuple(range(SHARDS))),)), {
        policy.id: policy.source
    }


async def serve_by(stack: Stack, source: str, *replicas: str) -> str:
    """Give the whole fleet's traffic to one policy; return its id."""
    chosen, arms = allocation(source, *replicas)
    async with PickerLink(RunDir(stack.run_dir).link_socket) as link:
        link.allocate(Allocate(chosen, arms, Objective()))
        arm_id = chosen.cells[0].arm_id
        while arm_id not in RunDir(stack.run_dir).allocation.read_text():
            await asyncio.sleep(0.01)
    return arm_id


@contextmanager
def serving(stack: Stack, source: str, *replicas: str) -> Iterator[str]:
    RunDir(stack.run_dir).allocation.touch()
    try:
        yield asyncio.run(serve_by(stack, source, *replicas))
    finally:
        asyncio.run(serve_by(stack, FEWEST_REQUESTS, "r0", "r1", "r2"))


def raw_post(request_id: str, body: bytes) -> bytes:
    head = ["host: x", f"x-request-id: {request_id}", f"content-length: {len(body)}"]
    return "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *head, "", ""]).encode() + body


class Records:
    """Collects what the link brings until all of the wanted requests are there."""

    def __init__(self, stack: Stack) -> None:
        self._path = RunDir(stack.run_dir).link_socket
        self.batches: list[Batch] = []

    def of(self, *wanted: str) -> list[RequestRecord]:
        return asyncio.run(self._collect(wanted))

    async def _collect(self, wanted: tuple[str, ...]) -> list[RequestRecord]:
        found: dict[str, RequestRecord] = {}
        async with PickerLink(self._path) as link, asyncio.timeout(10):
            while not all(name in found for name in wanted):
                batch = await anext(link)
                link.acknowledge([batch])
                self.batches.append(batch)
                found |= {record.id: record for record in batch.requests}
        return [found[name] for name in wanted]


def test_the_openai_package_gets_a_plain_answer(stack: Stack):
    answer = client(stack).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=3
    )
    assert answer.choices[0].message.content == "word word word "
    assert answer.usage
    assert answer.usage.completion_tokens == 3


def test_the_openai_package_gets_a_stream(stack: Stack):
    with client(stack).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=5, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "word " * 5


def test_a_stream_is_not_delayed(stack: Stack):
    started_s = time.monotonic()
    with client(stack).chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=10,
        stream=True,
        extra_body={"test": {"each_s": 0.02}},
    ) as stream:
        gaps = [time.monotonic() - started_s for _ in stream]
    assert gaps[-1] - gaps[0] > 0.1  # the first did not wait for the last


def test_operators_see_who_decided_and_who_answered(stack: Stack):
    answer = stack.post(chat(), headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(answer.headers["x-autopoiesis-arm"]) == 12
    assert answer.headers["x-autopoiesis-replica"] == answer.headers["x-served-by"]
    assert "x-autopoiesis-arm" not in stack.request("GET", "/v1/models").headers


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param", "words"),
    [
        ("POST", "/v1/chat/completions", b"{nope", 400, None, "not valid JSON"),
        (
            "POST",
            "/v1/chat/completions",
            b'{"messages": 1}',
            400,
            "messages",
            "'messages' must be a list",
        ),
        ("POST", "/v1/completions", b"{}", 400, "prompt", "'prompt' is missing"),
        ("POST", "/elsewhere", b"{}", 404, None, "There is nothing at this path"),
        ("DELETE", "/v1/chat/completions", None, 404, None, "There is nothing at this path"),
    ],
)
def test_errors_are_openai_shaped(
    stack: Stack,
    method: str,
    path: str,
    body: bytes | None,
    status: int,
    param: str | None,
    words: str,
):
    answer = stack.request(method, path, body, {"content-type": "application/json"})
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    error: Mapping[str, Any] = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["param"] == param
    assert stack.post(chat()).status == 200


def test_the_openai_package_raises_what_it_should(stack: Stack):
    with pytest.raises(openai.BadRequestError, match="must be a list"):
        client(stack).chat.completions.create(model="m", messages="hello")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_50_megabytes_is_refused(stack: Stack, chunked: bool):
    part = bytes(1 << 20)
    body = (part for _ in range(50)) if chunked else 50 * part
    answer = httpx.post(
        f"http://127.0.0.1:{stack.port}/v1/chat/completions", content=body, timeout=20
    )
    assert answer.status_code == 413
    assert "larger than 32 MiB" in answer.json()["error"]["message"]
    assert stack.post(chat()).status == 200


def test_what_is_no_http_is_refused(stack: Stack):
    with socket.create_connection(("127.0.0.1", stack.port), timeout=5) as raw:
        raw.sendall(b"\x00\x01nonsense\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert stack.post(chat()).status == 200


def test_an_error_of_the_replica_passes_unchanged(stack: Stack):
    answer = stack.post(chat(test={"status": 422}))
    assert (answer.status, answer.json["error"]["message"]) == (422, "as asked")


def test_a_client_cannot_choose_the_replica(stack: Stack):
    last = stack.members[2].address
    with serving(stack, FIRST_REPLICA, "r0"):
        for header in (
            "x-gateway-destination-endpoint",
            "X-Gateway-Destination-Endpoint-Subset",
            "x-autopoiesis-arm",
        ):
            answer = stack.post(chat(), headers={header: last})
            assert answer.headers["x-served-by"] == "r0"
            assert answer.headers["x-autopoiesis-arm"] != last
    reserved = {"x-envoy-max-retries": "9", "x-gateway-y": "1"}
    seen = stack.post({"input": "x"}, "/v1/embeddings", reserved).json["headers"]
    assert not {name.lower() for name in seen} & set(reserved)


def test_requests_of_a_session_go_to_one_cell(stack: Stack):
    policy = verify(FIRST_REPLICA)
    other = verify(FIRST_REPLICA.replace("position", "position + 1"))
    cells = (
        Cell(policy.id, ("r0",), tuple(range(32))),
        Cell(other.id, ("r1",), tuple(range(32, 64))),
    )

    async def give() -> None:
        async with PickerLink(RunDir(stack.run_dir).link_socket) as link:
            arms = {policy.id: policy.source, other.id: other.source}
            link.allocate(Allocate(Allocation(8, cells), arms, Objective()))
            while '"window":8' not in RunDir(stack.run_dir).allocation.read_text():
                await asyncio.sleep(0.01)

    with serving(stack, FIRST_REPLICA, "r0"):
        asyncio.run(give())
        served: dict[str, set[str]] = {}
        for session in map(str, range(12)):
            answers = [
                stack.post(chat(f"{session} {i}"), headers={"x-session-id": session})
                for i in range(4)
            ]
            served[session] = {answer.headers["x-served-by"] for answer in answers}
    assert all(len(replicas) == 1 for replicas in served.values())
    assert set.union(*served.values()) == {"r0", "r1"}


def test_a_request_that_is_shed_is_told_when_to_come_back(stack: Stack):
    records = Records(stack)
    with serving(stack, SHED_ALL, "r0", "r1", "r2") as arm_id:
        answer = stack.post(chat(), headers={"x-request-id": "shed"})
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json["error"]["type"] == "rate_limit_error"
    (record,) = records.of("shed")
    assert (record.status, record.arm_id, record.window) == (Status.SHED, arm_id, 7)
    assert sum(r.id == "shed" for b in records.batches for r in b.requests) == 1


def test_a_held_request_is_released_when_its_replica_is_free(stack: Stack):
    async def both() -> list[int]:
        slow = asyncio.to_thread(
            stack.post, chat(test={"first_s": 0.4}), headers={"x-request-id": "slow"}
        )
        running = asyncio.create_task(slow)
        await asyncio.sleep(0.1)
        held = await asyncio.to_thread(stack.post, chat(), headers={"x-request-id": "held"})
        return [(await running).status, held.status]

    records = Records(stack)
    with serving(stack, ONE_AT_A_TIME, "r0"):
        assert asyncio.run(both()) == [200, 200]
    slow, held = records.of("slow", "held")
    assert slow.held_s == 0.0
    assert 0.1 < held.held_s < 2.0
    assert held.replica == slow.replica == "r0"


def test_a_client_that_leaves_while_held_is_counted_against_nobody(stack: Stack):
    async def leave() -> None:
        running = asyncio.create_task(asyncio.to_thread(stack.post, chat(test={"first_s": 0.8})))
        await asyncio.sleep(0.1)
        body = b'{"messages": []}'
        _, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(raw_post("left", body))
        await asyncio.sleep(0.2)
        writer.close()
        await running
        assert (await asyncio.to_thread(stack.post, chat())).status == 200

    records = Records(stack)
    with serving(stack, ONE_AT_A_TIME, "r0"):
        asyncio.run(leave())
    (record,) = records.of("left")
    assert (record.status, record.replica) == (Status.ABORTED, "")


def test_records_tell_tokens_and_times(stack: Stack):
    records = Records(stack)
    text = "tell me more " * 100
    stack.post(
        chat(text, max_tokens=6, priority=2), headers={"x-request-id": "plain", "x-session-id": "s"}
    )
    test = {"first_s": 0.2, "each_s": 0.02}
    stack.post(chat(text, stream=True, max_tokens=8, test=test), headers={"x-request-id": "stream"})
    stack.post(
        chat(text, stream=True, max_tokens=40, test={"usage": False}),
        headers={"x-request-id": "uncounted"},
    )
    stack.post(b"{", headers={"x-request-id": "wrong"})
    stack.post(chat(test={"status": 500}), headers={"x-request-id": "error"})
    plain, stream, uncounted, error = records.of("plain", "stream", "uncounted", "error")
    assert (plain.status, plain.output_tokens, plain.usage_counted, plain.ttft_s) == (
        Status.COMPLETED,
        6,
        True,
        None,
    )
    assert plain.input_tokens == stream.input_tokens > 200
    assert (plain.priority_class, plain.stream, plain.attempts, plain.http_status) == (
        2.0,
        False,
        1,
        200,
    )
    assert plain.session != 0
    assert plain.replica in {"r0", "r1", "r2"}
    assert plain.model == "m"
    assert len(plain.blocks) == len(text) // 1024
    assert plain.decision_s < 0.1
    assert plain.cached_tokens == 0
    assert (stream.output_tokens, stream.usage_counted, stream.stream) == (8, True, True)
    assert stream.ttft_s == pytest.approx(0.2, abs=0.1)
    assert stream.tpot_s == pytest.approx(0.02, rel=0.5)
    assert abs(stream.arrived_s - time.time()) < 30
    assert not uncounted.usage_counted
    assert 10 < uncounted.output_tokens < 160
    assert (error.status, error.http_status, error.output_tokens) == (Status.FAILED, 500, 0)


def test_samples_of_the_replicas_come_too_and_nothing_stays_in_flight(stack: Stack):
    async def idle_sample() -> ReplicaSample:
        async with PickerLink(RunDir(stack.run_dir).link_socket) as link, asyncio.timeout(10):
            now_s = time.time()
            async for batch in link:
                for sample in batch.replicas:
                    if sample.at_s > now_s and sample.in_flight == 0:
                        return sample
        raise AssertionError

    seen = asyncio.run(idle_sample())
    assert (seen.running, seen.waiting, seen.kv_usage, seen.healthy) == (3.0, 1.0, 0.25, True)
    assert seen.address in {member.address for member in stack.members}


def test_a_stream_that_breaks_has_failed_and_one_that_is_left_is_aborted(stack: Stack):
    records = Records(stack)
    with pytest.raises(http.client.IncompleteRead):
        stack.post(
            chat(stream=True, max_tokens=9, test={"break_after": 3, "each_s": 0.05}),
            headers={"x-request-id": "broken"},
        )

    async def leave() -> None:
        body = b'{"messages": [], "stream": true, "max_tokens": 50, "test": {"each_s": 0.05}}'
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(raw_post("gone", body))
        await reader.readuntil(b"word")
        writer.close()

    asyncio.run(leave())
    broken, gone = records.of("broken", "gone")
    assert (broken.status, broken.http_status) == (Status.FAILED, 200)
    assert gone.status is Status.ABORTED
    assert gone.ttft_s is not None


def test_what_no_route_takes_is_none_of_the_pickers_business(stack: Stack):
    for _ in range(6):
        assert stack.post({}, "/elsewhere").status == 404
    for name in ("r0", "r1", "r2"):  # a replica that seemed busy for ever would take nothing
        with serving(stack, ONE_AT_A_TIME, name):
            assert stack.post(chat()).headers["x-served-by"] == name
