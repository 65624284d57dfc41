"""Windows on their way to the telemetry: where they cannot be written they wait, and serving goes on.

A full disk costs detail first: a window that failed a few times is written without its requests and
replica samples. Windows that cannot be written at all wait in memory, the newest of them, and are
written in order as soon as there is room.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation
from autopoiesis.gateway.link import Batch
from autopoiesis.orchestrator.loop import Settled
from autopoiesis.telemetry.records import EventRow, PlanRow, PrefixErrorRow, Reconfiguration
from autopoiesis.telemetry.store import Store, TelemetryError

log = logging.getLogger(__name__)

MOST_WINDOWS = 4_000
"""Windows that wait; 11 hours of windows of 10 s, in some 50 MB."""
MOST_REQUESTS = 50_000
"""Requests of waiting windows that are kept: as many as the picker keeps."""
PATIENCE = 3
"""Attempts with all detail before a window is written without."""
AT_ONCE = 100
"""Windows that are written one after the other once there is room; a second of work at most."""


@dataclass(slots=True)
class ClosedWindow:
    """All that is written of a window."""

    settled: Settled
    allocation: Allocation
    """Of the window after it."""
    batches: Sequence[Batch]
    """What the picker reported meanwhile."""
    events: Sequence[EventRow]
    state: dict[str, NDArray[Any]] | None
    """What the loop resumes from; None: a later window's will do."""
    plans: Sequence[PlanRow] = ()
    changes: Sequence[Reconfiguration] = ()
    """What was done to replicas meanwhile."""
    prefix_errors: Sequence[PrefixErrorRow] = ()
    attempts: int = 0

    def requests(self) -> int:
        """Return how many requests it holds."""
        return sum(len(batch.requests) for batch in self.batches)


class Recorder:
    """Writes windows in order, each as soon as the telemetry takes it."""

    def __init__(
        self,
        store: Store,
        acknowledge: Callable[[Sequence[Batch]], None],
        say: Callable[[str], None],
    ) -> None:
        """`acknowledge` is told of batches that need not be kept any longer, `say` of trouble and its end."""
        self._store = store
        self._acknowledge = acknowledge
        self._say = say
        self._waiting: deque[ClosedWindow] = deque()
        self._in_trouble = False
        self._late = self._lost = self._dropped = 0

    def __len__(self) -> int:
        """Return how many windows wait."""
        return len(self._waiting)

    def record(self, closed: ClosedWindow) -> bool:
        """Write a window after those that wait; return whether none waits any longer."""
        for earlier in self._waiting:
            earlier.state = None
        self._waiting.append(closed)
        for _ in range(AT_ONCE):
            if not self._waiting:
                break
            oldest = self._waiting[0]
            if not self._write(oldest):
                self._make_do()
                return False
            self._waiting.popleft()
            self._late += oldest is not closed
        if not self._waiting and self._in_trouble:
            self._tell_the_end()
        return not self._waiting

    def _write(self, closed: ClosedWindow) -> bool:
        """Write a window, after some attempts without detail; return whether it is written."""
        try:
            try:
                self._attempt(closed)
            except TelemetryError:
                if closed.attempts < PATIENCE or not closed.batches:
                    raise
                self._drop_detail(closed)
                self._attempt(closed)
        except TelemetryError as error:
            log.error("%s", error)
            if not self._in_trouble:
                self._say(f"windows cannot be written and wait in memory: {error}")
            self._in_trouble = True
            return False
        self._acknowledge(closed.batches)
        return True

    def _attempt(self, closed: ClosedWindow) -> None:
        closed.attempts += 1
        settled = closed.settled
        self._store.write_window(
            settled.window,
            settled.cells,
            [record for batch in closed.batches for record in batch.requests],
            settled.estimates,
            closed.allocation,
            settled.twin_errors,
            [sample for batch in closed.batches for sample in batch.replicas],
            [*settled.events, *closed.events],
            closed.state,
            closed.plans,
            closed.changes,
            closed.prefix_errors,
        )

    def _make_do(self) -> None:
        """Keep no more in memory than may be kept."""
        requests = sum(closed.requests() for closed in self._waiting)
        for closed in self._waiting:
            if requests <= MOST_REQUESTS:
                break
            requests -= closed.requests()
            self._drop_detail(closed)
        while len(self._waiting) > MOST_WINDOWS:
            self._drop_detail(self._waiting.popleft())
            self._lost += 1

    def _drop_detail(self, closed: ClosedWindow) -> None:
        self._dropped += closed.requests()
        self._acknowledge(closed.batches)
        closed.batches = ()

    def _tell_the_end(self) -> None:
        told = f"windows are written again; {self._late} waited"
        if self._dropped:
            told += f", {self._dropped} requests were dropped"
        if self._lost:
            told += f", {self._lost} windows were lost"
        self._say(told)
        self._in_trouble = False
        self._late = self._lost = self._dropped = 0
