"""The store: what the other rooms write and read, one transaction per window."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from duckdb import DuckDBPyConnection as Connection
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.telemetry.arrays import pack, unpack
from autopoiesis.telemetry.database import MEMORY_LIMIT, TelemetryError, open_database
from autopoiesis.telemetry.history import History, Retention
from autopoiesis.telemetry.owner import Owner
from autopoiesis.telemetry.query import MAX_ROWS, TIMEOUT_S, QueryResult, run_query
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CandidateRow,
    CellRow,
    EventRow,
    GuardRails,
    PlanRow,
    PrefixErrorRow,
    Reconfiguration,
    ReplicaSample,
    RequestRecord,
    SynthesisRow,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.telemetry.requests import (
    SELECT_REQUESTS,
    insert_requests,
    request_batch,
    requests_of,
)

__all__ = ["Retention", "Store", "TelemetryError"]

RENAMED = {"window": "window_id", "created_at": "created_s"}
"""Field → column, where they differ: `window` is a reserved word of SQL."""


def _names(record: type, *without: str) -> tuple[str, ...]:
    return tuple(f.name for f in fields(record) if f.name not in without)


ESTIMATE = _names(ArmEstimate)
SYNTHESIS = _names(SynthesisRow, "candidates")
CANDIDATE = _names(CandidateRow, "prompt", "answer")
ARM = _names(Arm)
RAILS = ("frozen", "dry_run", "human_only", "only_arm", "held", "reason", "at_s")
STEP = ("arm_id", "state", "pinned", "reason", "at_s")
CELL = _names(Cell)


class Store:
    """The telemetry of one instance, owned by one process. Any thread may call any method.

    A failed write (a full disk, say) raises `TelemetryError`, keeps nothing of it, and leaves the
    store usable.
    """

    def __init__(self, path: Path, owner: Owner, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._owner = owner
        self.clock = clock
        self._last_window = self._greatest("window_id", "windows")
        self._last_synthesis = self._greatest("synthesis", "syntheses")
        ((self._regret_so_far,),) = owner.fetch(
            "select coalesce(arg_max(regret_so_far, window_id), 0.0) from windows"
        )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        memory_limit: str = MEMORY_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open or make the file at `path` and become its owner.

        Raises:
            TelemetryError: another process owns it, or it is damaged, foreign or newer than we are.
        """
        path = Path(path)
        return cls(
            path,
            Owner(str(path), lambda: open_database(path, memory_limit=memory_limit, clock=clock)),
            clock,
        )

    def close(self) -> None:
        """Stop running queries and let go of the file."""
        self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing ------------------------------------------------------------------------------

    def write_window(
        self,
        window: WindowRow,
        cells: Sequence[CellRow] = (),
        requests: Sequence[RequestRecord] = (),
        estimates: Sequence[ArmEstimate] = (),
        allocation: Allocation | None = None,
        twin_errors: Sequence[TwinErrorRow] = (),
        replicas: Sequence[ReplicaSample] = (),
        events: Sequence[EventRow] = (),
        state: Mapping[str, NDArray[Any]] | None = None,
        plans: Sequence[PlanRow] = (),
        reconfigurations: Sequence[Reconfiguration] = (),
        prefix_errors: Sequence[PrefixErrorRow] = (),
    ) -> None:
        """Write one closed window, and with it the next window's allocation, in one transaction.

        `state` takes the place of all arrays stored before; None keeps them.

        Raises:
            TelemetryError: nothing of it was written; the window was closed before, or the engine
                failed.
            ValueError: a state array holds something else than numbers or strings.
        """
        if window.window <= self._last_window:
            raise TelemetryError(
                f"Window {window.window} cannot be written: window {self._last_window} is closed already."
            )
        batch = request_batch(requests)
        arrays = None if state is None else [(name, *pack(name, a)) for name, a in state.items()]

        regret = window.regret if window.regret is not None else 0.0
        so_far = self._regret_so_far + (regret if math.isfinite(regret) else 0.0)

        def write(c: Connection) -> None:
            _insert(c, "windows", _names(WindowRow), [window], regret_so_far=so_far)
            _insert(c, "cells", _names(CellRow), cells)
            insert_requests(c, batch)
            _insert(c, "arm_estimates", ESTIMATE, estimates, window_id=window.window)
            _insert(c, "twin_errors", _names(TwinErrorRow), twin_errors)
            _insert(c, "replicas", _names(ReplicaSample), replicas)
            _insert(c, "events", _names(EventRow), events)
            _insert(c, "plans", _names(PlanRow), plans)
            _insert(c, "reconfigurations", _names(Reconfiguration), reconfigurations)
            _insert(c, "prefix_errors", _names(PrefixErrorRow), prefix_errors)
            if allocation is not None:
                _replace_allocation(c, allocation)
            if arrays is not None:
                c.execute("delete from bandit_state")
                columns = ("window_id", "name", "dtype", "shape", "data")
                _append(c, "bandit_state", columns, [(window.window, *row) for row in arrays])

        self._owner.transact(write)
        self._last_window, self._regret_so_far = window.window, so_far

    def write_allocation(self, allocation: Allocation) -> None:
        """Write an allocation made outside the window loop: the first one, or an operator's."""
        self._owner.transact(lambda c: _replace_allocation(c, allocation))

    def write_events(self, events: Sequence[EventRow]) -> None:
        """Write events that do not wait for the end of a window."""
        self._owner.transact(lambda c: _insert(c, "events", _names(EventRow), events))

    def write_synthesis(self, synthesis: SynthesisRow) -> int:
        """Write one synthesis cycle with all its candidates; return its number."""
        number = self._last_synthesis + 1

        def write(c: Connection) -> None:
            count = len(synthesis.candidates)
            _insert(c, "syntheses", SYNTHESIS, [synthesis], synthesis=number, candidates=count)
            columns = ("synthesis", "position", *CANDIDATE)
            rows = [(number, i, *_values(x, CANDIDATE)) for i, x in enumerate(synthesis.candidates)]
            _append(c, "candidates", columns, rows)

        self._owner.transact(write)
        self._last_synthesis = number
        return number

    def save_arm(self, arm: Arm) -> None:
        """Write an arm in place of what was stored under its id, and the step it took to its history."""

        def write(c: Connection) -> None:
            before = c.execute("select state, pinned from arms where id = ?", [arm.id]).fetchone()
            c.execute("delete from arms where id = ?", [arm.id])
            _insert(c, "arms", ARM, [arm])
            if before != (arm.state, arm.pinned):
                pinned = before and before[0] == arm.state
                reason = ("pinned" if arm.pinned else "unpinned") if pinned else arm.reason
                step = (arm.id, str(arm.state), arm.pinned, reason, self.clock())
                _append(c, "arm_history", STEP, [step])

        self._owner.transact(write)

    def write_guard_rails(self, rails: GuardRails, reason: str, events: Sequence[EventRow]) -> None:
        """Write what an operator has ordered, and the events that tell of it."""
        held = _held_text(rails.held)
        row = (rails.frozen, rails.dry_run, rails.human_only, rails.only, held, reason)

        def write(c: Connection) -> None:
            _append(c, "guard_rails", RAILS, [(*row, self.clock())])
            _insert(c, "events", _names(EventRow), events)

        self._owner.transact(write)

    def keep_history(
        self, folder: Path, retention: Retention, now_s: float | None = None
    ) -> list[Path]:
        """Seal settled hours as Parquet files below `folder`, then forget what is older than `retention`.

        Returns the files written. The newest window stays, so that windows are never counted anew; so do
        arms and state.

        Raises:
            TelemetryError: a file could not be written; nothing is forgotten that is in none.
        """
        return History(self._owner, folder).keep(
            self.clock() if now_s is None else now_s, retention
        )

    # --- reading ------------------------------------------------------------------------------

    def last_window(self) -> int:
        """Return the number of the last closed window, -1 if there is none."""
        return self._last_window

    def load_arms(self) -> list[Arm]:
        """Return all arms, oldest first."""
        rows = self._owner.fetch(f"select {_columns(ARM)} from arms order by created_s, rowid")  # noqa: S608
        return [_arm(dict(zip(ARM, row, strict=True))) for row in rows]

    def load_allocation(self) -> Allocation | None:
        """Return the newest allocation, None if there is none."""
        rows = self._owner.fetch(
            "select window_id, arm_id, replicas, shards, propensity from allocations "
            "where window_id = (select max(window_id) from allocations) order by cell"
        )
        cells = [Cell(arm, tuple(group), tuple(shards), p) for _, arm, group, shards, p in rows]
        return Allocation(rows[0][0], tuple(cells)) if rows else None

    def load_guard_rails(self) -> GuardRails:
        """Return what an operator has ordered last."""
        rows = self._owner.fetch(
            "select frozen, dry_run, human_only, only_arm, held from guard_rails "
            "where rowid = (select max(rowid) from guard_rails)"
        )
        if not rows:
            return GuardRails()
        *ordered, held = rows[0]
        return GuardRails(*ordered, held=_held_allocation(held))

    def load_state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that the last window with a state wrote."""
        rows = self._owner.fetch("select name, dtype, shape, data from bandit_state order by rowid")
        try:
            return {name: unpack(name, dtype, shape, data) for name, dtype, shape, data in rows}
        except (ValueError, TypeError) as error:
            raise TelemetryError(
                f"The bandit state stored in {self.path} does not fit: {error}; move the file away."
            ) from error

    def requests_between(self, from_s: float, to_s: float) -> list[RequestRecord]:
        """Return the requests that arrived in [from_s, to_s), in order of arrival."""
        return requests_of(self._owner.fetch(SELECT_REQUESTS, [from_s, to_s]))

    def query(
        self, sql: str, max_rows: int = MAX_ROWS, timeout_s: float = TIMEOUT_S
    ) -> QueryResult:
        """Run one guarded, read-only query beside whatever is being written.

        Raises:
            QueryError: the query is not allowed, wrong, too slow or too large.
        """
        with self._owner.reader() as cursor:
            return run_query(cursor, sql, max_rows, timeout_s)

    def _greatest(self, column: str, table: str) -> int:
        return self._owner.fetch(f"select coalesce(max({column}), -1) from {table}")[0][0]  # noqa: S608


# --- records to rows --------------------------------------------------------------------------


def _columns(names: Iterable[str]) -> str:
    return ", ".join(f'"{RENAMED.get(name, name)}"' for name in names)


def _arm(stored: dict[str, Any]) -> Arm:
    stored["origin"] = Origin(stored["origin"])
    stored["state"] = State(stored["state"])
    stored["parents"] = tuple(stored["parents"])
    return Arm(**stored)


def _values(record: object, names: Sequence[str]) -> tuple[Any, ...]:
    return attrgetter(*names)(record)


def _insert(
    c: Connection, table: str, names: tuple[str, ...], records: Sequence[object], **same: float
) -> None:
    """Append records by their fields; `same` are columns with one value for all of them."""
    get = attrgetter(*names)
    constant = tuple(same.values())
    _append(c, table, (*same, *names), [(*constant, *get(r)) for r in records])


def _append(
    c: Connection, table: str, names: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    if rows:
        with c.appender(table, columns=[RENAMED.get(name, name) for name in names]) as appender:
            try:
                appender.append_rows([[_plain(value) for value in row] for row in rows])
                appender.flush()
            except Exception:
                appender.clear()  # the whole window is tried again
                raise


def _plain(value: Any) -> Any:
    """Return numpy's scalars as Python's; the engine takes no others."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple) and value and isinstance(value[0], np.generic):
        return [item.item() for item in value]
    return value


def _replace_allocation(c: Connection, allocation: Allocation) -> None:
    c.execute("delete from allocations where window_id = ?", [allocation.window])
    rows = [(allocation.window, i, *_values(x, CELL)) for i, x in enumerate(allocation.cells)]
    _append(c, "allocations", ("window_id", "cell", *CELL), rows)


def _held_text(held: Allocation | None) -> str:
    if held is None:
        return ""
    return orjson.dumps([held.window, [_values(cell, CELL) for cell in held.cells]]).decode()


def _held_allocation(text: str) -> Allocation | None:
    if not text:
        return None
    window, cells = orjson.loads(text)
    return Allocation(window, tuple(Cell(a, tuple(r), tuple(s), p) for a, r, s, p in cells))
