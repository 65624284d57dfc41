"""One simulated engine, stepped by its caller: what a real-time simulated replica runs on.

The kernels are the twin's own; they also run uncompiled (`NUMBA_DISABLE_JIT=1`), where a process
wants to start at once and a decode step of tens of sequences costs well under a millisecond.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.kernels import entry
from autopoiesis.twin import kv, scheduler
from autopoiesis.twin.latency import Profile

# The ways into the kernels, for an engine that is replica 0 and the only one.


@entry
def _fits(e: scheduler.Engines, input_tokens: int, output_tokens: int) -> bool:
    return scheduler.fits(e, 0, input_tokens, output_tokens)


@entry
def _submit(
    e: scheduler.Engines,
    slot: int,
    input_tokens: int,
    output_tokens: int,
    start: int,
    hashes: int,
    priority: float,
) -> None:
    scheduler.submit(e, 0, slot, input_tokens, output_tokens, start, hashes, priority)


@entry
def _abort(e: scheduler.Engines, slot: int) -> None:
    scheduler.abort(e, 0, slot)


@entry
def _plan(e: scheduler.Engines) -> bool:
    return scheduler.plan(e, 0, 0.0, 1)


@entry
def _complete(e: scheduler.Engines) -> int:
    return scheduler.complete(e, 0, True)


_SLOTS = 256
_HASHES = 4096


class Emission(NamedTuple):
    """One token of one request."""

    slot: int
    first: bool
    finished: bool


class Engine:
    """An engine of that profile; prefix hashes stand for blocks of `prefix_block_tokens` (0: no cache).

    `start_step`, wait for as long as it says, `finish_step`, and again. Not thread-safe.
    """

    def __init__(self, profile: Profile, prefix_block_tokens: int = 0) -> None:
        self.profile = profile
        self._e = scheduler.engines(
            [profile], [1.0], _SLOTS, np.zeros(_HASHES, np.int64), prefix_block_tokens
        )
        self._free = deque(range(_SLOTS))
        self._hashes_used = 0
        self._live: set[int] = set()
        self._aborted: set[int] = set()

    def submit(
        self,
        input_tokens: int,
        output_tokens: int,
        blocks: NDArray[np.int64],
        priority: float = 0.0,
    ) -> int:
        """Queue a request and return its slot, which is its own until it ends.

        A ValueError says that it has no tokens, or can never fit into the KV cache.
        """
        if input_tokens < 1 or output_tokens < 1:
            raise ValueError(
                f"a request needs at least 1 input and 1 output token, got {input_tokens} and {output_tokens}"
            )
        if not _fits(self._e, input_tokens, output_tokens):
            raise ValueError(
                f"{input_tokens} input and {output_tokens} output tokens exceed the KV cache of "
                f"{self.profile.kv_tokens} tokens; send less"
            )
        if not self._free:
            self._grow_slots()
        slot = self._free.popleft()
        start = self._store(blocks)
        _submit(self._e, slot, input_tokens, output_tokens, start, len(blocks), priority)
        self._live.add(slot)
        return slot

    def abort(self, slot: int) -> None:
        """Drop a request; one in the step under way leaves at its end. Ended requests are ignored."""
        if slot not in self._live:
            return
        if self._stepping and self._e.slots[slot, scheduler.PLACE] != scheduler.WAITS:
            self._aborted.add(slot)
            return
        _abort(self._e, slot)
        self._end(slot)

    def start_step(self) -> float | None:
        """Schedule one step and return its duration [s]; None when there is nothing to do."""
        if self._stepping:
            raise RuntimeError("the step under way must be finished first")
        if not _plan(self._e):
            return None
        return float(self._e.clock[0, scheduler.FIRST_STEP])

    def finish_step(self) -> list[Emission]:
        """End the step; return its tokens, at most one per request. A preempted request emits none."""
        if not self._stepping:
            raise RuntimeError("no step is under way")
        count = _complete(self._e)
        emissions: list[Emission] = []
        for slot, bits in self._e.events[:count].tolist():
            last = bool(bits & scheduler.LAST_OUT)
            if slot not in self._aborted:
                emissions.append(Emission(slot, bool(bits & scheduler.FIRST_OUT), last))
            if last:
                self._aborted.discard(slot)
                self._end(slot)
        for slot in self._aborted:
            _abort(self._e, slot)
            self._end(slot)
        self._aborted.clear()
        return emissions

    @property
    def running(self) -> int:
        """Return how many requests are in the batch."""
        return int(self._e.counts[0, scheduler.RUNNING])

    @property
    def waiting(self) -> int:
        """Return how many requests are queued, preempted ones included."""
        return int(self._e.counts[0, scheduler.WAITING])

    @property
    def kv_usage(self) -> float:
        """Return the share of KV blocks in use [0..1]; idle cached blocks count as free."""
        return float(self._e.kv.blocks[0, kv.USED] / self._e.kv.blocks[0, kv.CAPACITY])

    @property
    def prefix_queries(self) -> int:
        """Return the prompt tokens looked up in the prefix cache so far."""
        return int(self._e.counts[0, scheduler.PREFIX_QUERIES])

    @property
    def prefix_hits(self) -> int:
        """Return the prompt tokens found in the prefix cache so far."""
        return int(self._e.counts[0, scheduler.PREFIX_HITS])

    @property
    def preemptions(self) -> int:
        """Return the preemptions so far."""
        return int(self._e.counts[0, scheduler.PREEMPTIONS])

    def cached_tokens(self, slot: int) -> int:
        """Return how many prompt tokens of the request were cached when it was admitted."""
        return max(int(self._e.slots[slot, scheduler.CACHED]), 0)

    @property
    def _stepping(self) -> bool:
        return bool(self._e.counts[0, scheduler.STEPS] > 0)

    def _end(self, slot: int) -> None:
        self._live.discard(slot)
        self._free.append(slot)

    def _grow_slots(self) -> None:
        old = len(self._e.priority)
        self._e = self._e._replace(
            slots=np.concatenate([self._e.slots, np.zeros_like(self._e.slots)]),
            priority=np.concatenate([self._e.priority, np.zeros(old)]),
        )
        self._free.extend(range(old, 2 * old))

    def _store(self, blocks: NDArray[np.int64]) -> int:
        """Copy hashes to where the kernels find them; those of ended requests make room."""
        if self._hashes_used + len(blocks) > len(self._e.hashes):
            rows = self._e.slots
            kept = [
                (slot, self._e.hashes[start : start + rows[slot, scheduler.HASHES]].copy())
                for slot in self._live
                for start in (int(rows[slot, scheduler.HASHES_FROM]),)
            ]
            needed = sum(len(hashes) for _, hashes in kept) + len(blocks)
            self._e = self._e._replace(hashes=np.zeros(max(2 * needed, _HASHES), np.int64))
            self._hashes_used = 0
            for slot, hashes in kept:
                rows[slot, scheduler.HASHES_FROM] = self._append(hashes)
        return self._append(blocks)

    def _append(self, hashes: NDArray[np.int64]) -> int:
        start = self._hashes_used
        self._e.hashes[start : start + len(hashes)] = hashes
        self._hashes_used += len(hashes)
        return start
