"""Listens to the KV events of all replicas, in a thread of its own: nothing there can delay a decision."""

import logging
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from autopoiesis.replicas.kv_events import Feed, News

log = logging.getLogger(__name__)

GATHER_S = 0.05
"""How long news are gathered before they are told: the picker's thread is woken that rarely."""
POLL_MS = 200
MOST_MESSAGES = 2000
"""Messages of one replica that are read at once: no replica keeps the others waiting."""
LARGEST_MESSAGE = 64 << 20
"""Bytes; whoever sends more is cut off."""
NEEDED = ("zmq", "msgspec")


def available() -> bool:
    """Tell whether the libraries of the extra `kv-events` are there."""
    return all(find_spec(name) is not None for name in NEEDED)


class KvEvents:
    """Listens to the publishers of any number of replicas, in a thread of its own.

    `on_news` is called in that thread with a replica's name and what is new there. A publisher that is not
    there is waited for, one that comes back is heard again, and what is no message of vLLM's is told once.
    """

    def __init__(self, on_news: Callable[[str, News], None]) -> None:
        self._on_news = on_news
        self._wanted: dict[str, str] = {}
        self._changed = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._told_unavailable = False

    def follow(self, endpoints: Mapping[str, str]) -> None:
        """Listen to these from now on (replica → ZMQ endpoint); those that stay miss nothing."""
        with self._changed:
            self._wanted = dict(endpoints)
        if endpoints and self._thread is None:
            if not available():
                if not self._told_unavailable:
                    log.warning("KV events are not read: pip install 'autopoiesis[kv-events]'")
                self._told_unavailable = True
                return
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._stopped.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        import zmq  # noqa: PLC0415 - an extra

        heard: dict[str, tuple[str, Any]] = {}
        feeds: dict[str, Feed] = {}
        garbage: set[str] = set()
        poller = zmq.Poller()
        with zmq.Context() as context:
            while not self._stopped.is_set():
                with self._changed:
                    wanted = dict(self._wanted)
                for name in [n for n, (at, _) in heard.items() if wanted.get(n) != at]:
                    _, socket = heard.pop(name)
                    poller.unregister(socket)
                    socket.close(linger=0)
                for name in wanted.keys() - heard.keys():
                    socket = context.socket(zmq.SUB)
                    try:
                        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
                        socket.subscribe(b"")
                        socket.connect(wanted[name])
                    except zmq.ZMQError as error:
                        socket.close(linger=0)
                        if name not in garbage:
                            log.warning(
                                "%s: %s is no endpoint of KV events (%s)", name, wanted[name], error
                            )
                            garbage.add(name)
                        continue
                    poller.register(socket, zmq.POLLIN)
                    heard[name] = (wanted[name], socket)
                    feeds[name] = Feed()
                ready = dict(poller.poll(POLL_MS))
                for name, (_, socket) in heard.items():
                    if socket not in ready:
                        continue
                    self._read(name, socket, feeds[name], garbage)
                    if news := feeds[name].news():
                        self._on_news(name, news)
                if ready:
                    self._stopped.wait(GATHER_S)
            for _, socket in heard.values():
                socket.close(linger=0)

    def _read(self, name: str, socket: Any, feed: Feed, garbage: set[str]) -> None:
        import zmq  # noqa: PLC0415 - an extra

        for _ in range(MOST_MESSAGES):
            try:
                feed.read(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            except ValueError as error:
                if name not in garbage:
                    log.warning("A KV event of %s is left out: %s", name, error)
                    garbage.add(name)
