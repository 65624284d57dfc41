import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.link import (
    Allocate,
    Batch,
    LinkError,
    LinkServer,
    Outbox,
    PickerLink,
    decode_line,
)
from autopoiesis.telemetry.records import ReplicaSample, RequestRecord, Status

RECORD = RequestRecord(
    id="x", arrived_s=1.5, path="/v1/completions", model="m", status=Status.COMPLETED, http_status=200,
    arm_id="a", window=3, shard=5, session=-(2**62), replica="r0", attempts=1, stream=True, input_tokens=10,
    output_tokens=20, max_output_tokens=30, cached_tokens=0, usage_counted=True, priority_class=0.0, held_s=0.0,
    decision_s=0.0001, ttft_s=None, e2e_s=1.0, blocks=(2**62, -5),
)  # fmt: skip
SAMPLE = ReplicaSample(1.0, "r0", "127.0.0.1:1", True, 1, 1.0, 0.0, 0.5, 1.0, 2.0, 3.0)
ALLOCATION = Allocation(
    4, (Cell("a", ("r0", "r1"), (0, 1, 2), 0.25), Cell("b", ("r2",), (3,), 1.0))
)


def record(name: str) -> RequestRecord:
    return replace(RECORD, id=name)


def test_messages_survive_the_wire():
    outbox = Outbox()
    outbox.add_request(RECORD)
    outbox.add_sample(SAMPLE)
    outbox.add_fault("a", "wrong", 2)
    batch = outbox.next_batch()
    assert batch
    assert Batch.decode(decode_line(batch.encode())) == batch
    message = Allocate(ALLOCATION, {"a": "source"}, Objective(2.0, 0.2))
    assert Allocate.decode(decode_line(message.encode())) == message


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}"])
def test_a_line_that_is_no_message_is_refused(line: bytes):
    with pytest.raises(LinkError):
        decode_line(line)


@pytest.mark.parametrize(
    "change",
    [{"window": "x"}, {"cells": None}, {"cells": [{}]}, {"objective": {"slo_ttft_s": -1}}, {"arms": 3},
     {"cells": [{"arm_id": "a", "replicas": [], "shards": [1, 1], "propensity": 1.0}]},
     {"cells": [{"arm_id": "a", "replicas": [], "shards": [64], "propensity": 1.0}]}],
)  # fmt: skip
def test_a_wrong_allocation_is_refused(change: dict[str, object]):
    message = decode_line(Allocate(ALLOCATION, {}, Objective()).encode())
    with pytest.raises(LinkError):
        Allocate.decode({**message, **change})


def test_batches_stay_until_acknowledged():
    outbox = Outbox()
    outbox.add_request(record("1"))
    first = outbox.next_batch()
    outbox.add_request(record("2"))
    second = outbox.next_batch()
    assert first
    assert second
    assert outbox.next_batch() is None
    outbox.acknowledge(first.sequence)
    assert outbox.unacknowledged == (second,)


def test_a_full_buffer_drops_the_oldest_and_says_so():
    outbox = Outbox(most_buffered=10)
    for i in range(5):
        outbox.add_request(record(str(i)))
    outbox.next_batch()
    for i in range(5, 17):
        outbox.add_request(record(str(i)))
    batch = outbox.next_batch()
    assert batch
    assert [r.id for r in batch.requests] == [str(i) for i in range(7, 17)]
    assert [(f.count, f.arm_id) for f in batch.faults] == [(7, "")]
    assert outbox.unacknowledged == (batch,)


async def test_nothing_is_lost_or_doubled_when_the_connection_breaks(tmp_path: Path):
    outbox, received = Outbox(), list[Allocate]()
    server = LinkServer(outbox, received.append)
    await server.start(tmp_path / "link.sock")
    sending = asyncio.create_task(server.run())
    async with PickerLink(tmp_path / "link.sock") as link:
        link.allocate(Allocate(ALLOCATION, {"a": "source"}, Objective()))
        outbox.add_request(record("1"))
        first = await asyncio.wait_for(anext(link), 5)
        assert [r.id for r in first.requests] == ["1"]
        assert received == [Allocate(ALLOCATION, {"a": "source"}, Objective())]
        await server.close()  # breaks before the acknowledgement
        await server.start(tmp_path / "link.sock")
        outbox.add_request(record("2"))
        second = await asyncio.wait_for(anext(link), 5)
        assert [r.id for r in second.requests] == ["2"]
        assert len(received) == 2  # the allocation was sent again
        link.acknowledge([first, second])
        while outbox.unacknowledged:
            await asyncio.sleep(0.01)
    async with PickerLink(tmp_path / "link.sock") as fresh:
        outbox.add_request(record("3"))
        assert [r.id for r in (await asyncio.wait_for(anext(fresh), 5)).requests] == ["3"]
    async with PickerLink(
        tmp_path / "link.sock"
    ) as another:  # a new controller gets what was never acknowledged
        assert [r.id for r in (await asyncio.wait_for(anext(another), 5)).requests] == ["3"]
    sending.cancel()
    await server.close()
