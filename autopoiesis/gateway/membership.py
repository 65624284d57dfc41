"""Who is in the fleet: replicas by name, by address and by their row in the kernels' arrays."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms import fleet
from autopoiesis.arms.fleet import FleetState
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.prefix import BLOCK_TOKENS, CHARS_PER_TOKEN, forget_oldest, forget_replica
from autopoiesis.gateway.load_report import LoadReport
from autopoiesis.gateway.progress import Progress
from autopoiesis.replicas.kv_events import News

MOST_REPLICAS = 256
PREFIX_SLOTS = 4096
"""Most prefix blocks remembered per replica (about a million tokens)."""


class Member(Protocol):
    """What must be known of a replica."""

    @property
    def kv_events(self) -> str:
        """ZMQ endpoint of its KV events, empty for none."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def address(self) -> str:
        """`IP:port`."""
        ...

    @property
    def speed(self) -> float:
        """Its speed relative to its profile."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV cache holds, 0 if unknown."""
        ...


class Membership:
    """The fleet's replicas and what they say of themselves. `clock` gives seconds, never going back."""

    def __init__(self, objective: Objective, clock: Callable[[], float]) -> None:
        self.fleet: FleetState = fleet.fleet_state(
            MOST_REPLICAS, objective, PREFIX_SLOTS, BLOCK_TOKENS
        )
        self.progress = Progress(MOST_REPLICAS, clock)
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._index: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._addresses: dict[int, str] = {}
        self._by_address: dict[str, int] = {}
        self._free = deque(range(MOST_REPLICAS))
        self._kv_tokens: dict[str, int] = {}
        self._down: set[str] = set()
        self._evicted = np.zeros(MOST_REPLICAS)
        """(R,): blocks of the index that should have been forgotten, and are not whole yet."""
        self._resting: set[int] = set()

    def set_members(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet, at most `MOST_REPLICAS`; those that stay keep what is known of them."""
        wanted = {m.name: m for m in members[:MOST_REPLICAS]}
        for name, old in list(self._members.items()):
            if name not in wanted or wanted[name].address != old.address:
                self._leave(name)
        for name, member in wanted.items():
            if name not in self._index:
                self._enter(member)
            self._members[name] = member
            self.fleet.replica[self._index[name], fleet.SPEED] = member.speed

    def set_healthy(self, name: str, healthy: bool) -> bool:
        """Let a replica receive new requests, or none; tell whether that is a change."""
        if name not in self._index or healthy == (name not in self._down):
            return False
        (self._down.discard if healthy else self._down.add)(name)
        self._open_or_close(self._index[name])
        return True

    def set_resting(self, replica: int, resting: bool) -> None:
        """Send no new requests to a replica that is there, or send them again."""
        (self._resting.add if resting else self._resting.discard)(replica)
        self._open_or_close(replica)

    def report(self, name: str, running: float, waiting: float, kv_usage: float) -> None:
        """Take over what a replica says of itself."""
        if name in self._index:
            fleet.report(self.fleet, self._index[name], running, waiting, kv_usage)

    def report_generated(self, name: str, generated_tokens: float, running: float) -> None:
        """Take over how many tokens a replica says it has generated, for as many sequences as it runs."""
        if name in self._index:
            self.progress.reported(self._index[name], generated_tokens, running)

    def report_load(self, replica: int, load: LoadReport) -> None:
        """Take over what a replica (-1: none) says of its load in an answer."""
        row = self.fleet.replica[replica] if replica >= 0 else None
        if row is not None and load.waiting is not None:
            row[fleet.WAITING] = load.waiting
        if row is not None and load.kv_usage is not None:
            row[fleet.KV_USAGE] = load.kv_usage

    def set_kv_tokens(self, name: str, tokens: int) -> None:
        """Bound what a replica's prefix index remembers by what its KV cache holds."""
        if name in self._index and tokens > 0:
            self._kv_tokens[name] = tokens
            self.fleet.prefixes.capacity[self._index[name]] = self._prefix_blocks(tokens)

    def cache_changed(self, name: str, news: News) -> None:
        """Forget what a replica's cache has lost, by its own KV events.

        The engine evicts only where its cache is full: what it evicted, as a share of what fits, is the share
        that the oldest entries here have lost, however many of its blocks hold answers or others' prompts.
        """
        if name not in self._index:
            return
        replica, prefixes = self._index[name], self.fleet.prefixes
        if news.cleared:
            forget_replica(prefixes, replica)
            self._evicted[replica] = 0.0
        if tokens := self._kv_tokens.get(name, self._members[name].kv_tokens):
            share = min(news.evicted_tokens / tokens, 1.0)
            self._evicted[replica] += share * float(prefixes.used[replica])
            whole = int(self._evicted[replica])
            self._evicted[replica] -= whole
            forget_oldest(prefixes, replica, whole)

    def own_account(self, name: str) -> tuple[float, float]:
        """Return a replica's requests in flight and its use of the KV cache [0..1], both by our own count.

        Tokens of prompts that wait are counted as used; of a cache of unknown size as much is assumed as is remembered.
        """
        if name not in self._index:
            return 0.0, 0.0
        row = self.fleet.replica[self._index[name]]
        fits = self._kv_tokens.get(name, self._members[name].kv_tokens)
        fits = fits or PREFIX_SLOTS * int(self.fleet.block_tokens[0])
        used = float(row[fleet.QUEUED_PREFILL] + row[fleet.DECODING])
        return float(row[fleet.IN_FLIGHT]), min(used / fits, 1.0)

    def set_chars_per_token(self, ratio: float) -> None:
        """Translate prefix blocks, which are cut by characters, into tokens."""
        self.fleet.block_tokens[0] = max(1, round(BLOCK_TOKENS * CHARS_PER_TOKEN / ratio))

    # --- names --------------------------------------------------------------------------------

    def name_of(self, replica: int) -> str:
        """Return a replica's name, empty for -1 and for one that left."""
        return self._names.get(replica, "")

    def address_of(self, replica: int) -> str:
        """Return the address of a replica that is in the fleet."""
        return self._addresses[replica]

    def at_address(self, address: str) -> int:
        """Return the index of the replica at an address, -1 if none is."""
        return self._by_address.get(address, -1)

    def indexes(self, names: Iterable[str] | None = None) -> NDArray[np.int64]:
        """Return the indexes of those named that are in the fleet, in this order; of all, rising, if None."""
        if names is None:
            return np.array(sorted(self._names), np.int64)
        return np.array([self._index[n] for n in names if n in self._index], np.int64)

    def in_flight(self, name: str) -> int:
        """Return how many requests are on their way at a replica, by our own count."""
        known = name in self._index
        return int(self.fleet.replica[self._index[name], fleet.IN_FLIGHT]) if known else 0

    def least_loaded(self, besides: Iterable[int] = ()) -> list[int]:
        """Return the replicas not in `besides`: those that take requests first, then by requests in flight."""
        left_out, rows = set(besides), self.fleet.replica
        if len(left_out) == len(self._names):
            return []
        others = [r for r in self._names if r not in left_out]
        return sorted(others, key=lambda r: (rows[r, fleet.DRAINING], rows[r, fleet.IN_FLIGHT]))

    def takes_requests(self, replicas: NDArray[np.int64]) -> bool:
        """Tell whether any of these replicas takes new requests."""
        return bool((self.fleet.replica[replicas, fleet.DRAINING] == 0.0).any())

    # --- inside -------------------------------------------------------------------------------

    def _enter(self, member: Member) -> None:
        free = self._free.popleft()
        self._index[member.name], self._names[free] = free, member.name
        self._by_address[member.address], self._addresses[free] = free, member.address
        tokens = self._kv_tokens.get(member.name, member.kv_tokens)
        self._evicted[free] = 0.0
        self.progress.forget(free)
        fleet.join(self.fleet, free, member.speed, self._prefix_blocks(tokens), self._clock())

    def _leave(self, name: str) -> None:
        index = self._index.pop(name)
        del self._names[index]
        # Last in line: requests still on their way there must not count elsewhere.
        self._free.append(index)
        del self._by_address[self._addresses.pop(index)]
        del self._members[name]
        self._kv_tokens.pop(name, None)
        self._down.discard(name)
        self._resting.discard(index)
        self.fleet.replica[index, fleet.DRAINING] = 1.0

    def _open_or_close(self, index: int) -> None:
        closed = index in self._resting or self._names.get(index, "") in self._down
        self.fleet.replica[index, fleet.DRAINING] = 1.0 if closed else 0.0

    def _prefix_blocks(self, kv_tokens: int) -> int:
        blocks = kv_tokens // int(self.fleet.block_tokens[0])
        return min(PREFIX_SLOTS, blocks) if kv_tokens else PREFIX_SLOTS
