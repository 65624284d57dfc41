"""What a replica publishes of its KV cache, heard from a real ZMQ publisher."""

import logging
import threading
import time

import msgspec
import pytest
import zmq

from autopoiesis.replicas.fleet import free_ports
from autopoiesis.replicas.kv_events import Feed, News, decode
from autopoiesis.replicas.kv_subscriber import KvEvents

pack = msgspec.msgpack.Encoder().encode


def stored(blocks, size=16):
    return {
        "type": "BlockStored", "block_hashes": blocks, "parent_block_hash": None,
        "token_ids": [7] * size * len(blocks), "block_size": size, "lora_id": None, "medium": "GPU",
        "lora_name": None,
    }  # fmt: skip


def removed(blocks, medium="GPU"):
    return {"type": "BlockRemoved", "block_hashes": blocks, "medium": medium}


CLEARED = {"type": "AllBlocksCleared"}


def message(number, *events):
    return [b"", number.to_bytes(8, "big"), pack([1.5, list(events), 0])]


def fed(*messages):
    feed = Feed()
    for one in messages:
        feed.read(one)
    return feed.news()


def test_evictions_are_told_in_tokens():
    told = fed(message(0, stored([b"a", b"b"])), message(1, removed([b"a"]), removed([b"c", b"b"])))
    assert News(evicted_tokens=48) == told
    assert fed(message(0, stored([b"a"]))) is None


def test_what_leaves_another_memory_than_the_gpu_is_not_evicted():
    assert fed(message(0, stored([1])), message(1, removed([1], "CPU"))) is None


def test_a_cleared_cache_has_nothing_that_was_evicted_before():
    told = fed(message(0, stored([1]), removed([1])), message(1, CLEARED), message(2, removed([2])))
    assert News(cleared=True, evicted_tokens=16) == told


def test_missed_messages_are_counted_and_a_new_publisher_has_an_empty_cache():
    assert News(missed=3) == fed(message(0, stored([1])), message(4, stored([2])))
    assert News(cleared=True) == fed(message(7, stored([1])), message(0, stored([1])))


def test_events_of_older_versions_come_as_arrays():
    batch = [1.5, [["BlockStored", [1, 2], None, [5] * 32, 16, None], ["BlockRemoved", [1]]]]
    batch[1] += [["AllBlocksCleared"], ["SomethingNew", 1], {"type": "SomethingNew"}]
    told = decode(pack(batch))
    assert ["BlockStored", "BlockRemoved", "AllBlocksCleared"] == [kind for kind, _ in told]
    assert 16 == told[0][1]["block_size"]
    assert News(evicted_tokens=16) == fed([b"", bytes(8), pack([1.5, batch[1][:2]])])


@pytest.mark.parametrize(
    "frames",
    [
        [b"only one"],
        [b"", b"short", pack([1.0, []])],
        [b"", bytes(8), b"\xc1"],
        [b"", bytes(8), pack("text")],
        [b"", bytes(8), pack([1.0, 5])],
        [b"", bytes(8), pack([1.0, [{}]])],
        [b"", bytes(8), pack([1.0, [[[]]]])],
        [b"", bytes(8), pack([1.0, [stored([1], size=16) | {"block_size": -1}]])],
        [b"", bytes(8), pack([1.0, [{"type": "BlockStored"}]])],
        [b"", bytes(8), pack([1.0, [{"type": "BlockRemoved", "block_hashes": 4}]])],
    ],
)
def test_what_is_no_message_of_vllm_changes_nothing(frames):
    feed = Feed()
    feed.read(message(5, stored([1])))
    before = (feed.last, feed.block_tokens)
    with pytest.raises(ValueError, match="it"):
        feed.read(frames)
    assert before == (feed.last, feed.block_tokens)
    assert feed.news() is None


class Heard:
    """Gathers news; waits for what is expected of a replica."""

    def __init__(self):
        self.news = []
        self.came = threading.Condition()

    def __call__(self, name, news):
        with self.came:
            self.news.append((name, news))
            self.came.notify_all()

    def total(self, name):
        mine = [news for who, news in self.news if who == name]
        return (
            any(n.cleared for n in mine),
            sum(n.evicted_tokens for n in mine),
            sum(n.missed for n in mine),
        )

    def until(self, name, expected):
        with self.came:
            assert self.came.wait_for(lambda: self.total(name) == expected, 20), self.news


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def events(heard):
    events = KvEvents(heard)
    yield events
    events.stop()


def publisher(context, endpoint):
    socket = context.socket(zmq.XPUB)
    socket.bind(endpoint)
    return socket


def until_heard(socket):
    assert socket.poll(20_000), "nobody subscribed"
    socket.recv()


def test_several_replicas_are_heard_and_garbage_is_told_once(
    context, events, heard, tmp_path, caplog
):
    ends = {"a": f"tcp://127.0.0.1:{free_ports(1)[0]}", "b": f"ipc://{tmp_path}/b.kv"}
    events.follow({**ends, "none": "ipc:///nowhere/at/all", "wrong": "tcp://no host"})
    sockets = {name: publisher(context, end) for name, end in ends.items()}
    for socket in sockets.values():
        until_heard(socket)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sockets["a"].send_multipart([b"garbage"])
        sockets["a"].send_multipart(message(0, stored([1, 2])))
        sockets["a"].send_multipart(message(1, removed([1])))
        sockets["b"].send_multipart(message(0, stored([1], size=32)))
        sockets["b"].send_multipart(message(2, CLEARED))
        heard.until("a", (False, 16, 0))
        heard.until("b", (True, 0, 1))
    assert 1 == sum("of a is left out" in r.message for r in caplog.records)
    for socket in sockets.values():
        socket.close(linger=0)


def test_a_replica_that_dies_and_comes_back_is_heard_again_with_an_empty_cache(
    context, events, heard, tmp_path
):
    end = f"ipc://{tmp_path}/a.kv"
    events.follow({"a": end})
    first = publisher(context, end)
    until_heard(first)
    first.send_multipart(message(3, stored([1]), removed([1])))
    heard.until("a", (False, 16, 0))
    first.close(linger=0)
    second = publisher(context, end)
    until_heard(second)
    second.send_multipart(message(0, stored([1])))
    heard.until("a", (True, 16, 0))
    second.close(linger=0)


def test_who_is_followed_no_more_is_not_heard(context, events, heard, tmp_path):
    end = f"ipc://{tmp_path}/a.kv"
    events.follow({"a": end})
    socket = publisher(context, end)
    until_heard(socket)
    events.follow({})
    assert b"\x00" == socket.recv()[:1]  # it has unsubscribed
    assert [] == heard.news
    began_s = time.monotonic()
    events.stop()
    assert time.monotonic() - began_s < 20
    socket.close(linger=0)
