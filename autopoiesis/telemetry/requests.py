"""Request records to rows and back. They are many, so they travel as one Arrow batch."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection as Connection

from autopoiesis.telemetry.database import TelemetryError
from autopoiesis.telemetry.records import RequestRecord, Status

FIELDS = tuple(f.name for f in fields(RequestRecord))
COLUMNS = tuple("window_id" if name == "window" else name for name in FIELDS)
STATUS, BLOCKS = FIELDS.index("status"), FIELDS.index("blocks")

SELECT_REQUESTS = (
    f"select {', '.join(COLUMNS)} from requests "  # noqa: S608
    "where arrived_s >= ? and arrived_s < ? order by arrived_s, rowid"
)

_TEXT = {"id", "path", "model", "status", "arm_id", "replica"}
_TRUTH = {"stream", "usage_counted"}
_REAL = {"arrived_s", "priority_class", "held_s", "decision_s", "ttft_s", "tpot_s", "e2e_s"}


def request_batch(requests: Sequence[RequestRecord]) -> Any:
    """Return the records as an Arrow table, None if there are none.

    Raises:
        TelemetryError: a record holds what its column cannot.
    """
    if not requests:
        return None
    names = (*FIELDS, "tpot_s")
    columns = zip(*map(attrgetter(*names), requests), strict=True)
    try:
        arrays = [_array(name, column) for name, column in zip(names, columns, strict=True)]
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TelemetryError(f"A request record does not fit its table: {error}") from error
    return pa.table(arrays, names=[*COLUMNS, "tpot_s"])


def _array(name: str, column: Sequence[Any]) -> Any:
    if name == "blocks":
        ends = pa.array(accumulate(map(len, column), initial=0), pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(chain.from_iterable(column), pa.int64()))
    if name in _TEXT:
        return pa.array(column, pa.string())
    if name in _TRUTH:
        return pa.array(column, pa.bool_())
    return pa.array(column, pa.float64() if name in _REAL else pa.int64())


def insert_requests(c: Connection, batch: Any) -> None:
    """Insert a batch that `request_batch` made."""
    if batch is None:
        return
    c.register("request_batch", batch)
    try:
        c.execute("insert into requests by name select * from request_batch")
    finally:
        with suppress(duckdb.TransactionException):  # after a failure; its cause is what counts
            c.unregister("request_batch")


def requests_of(rows: Sequence[tuple[Any, ...]]) -> list[RequestRecord]:
    """Return the records of the rows that `SELECT_REQUESTS` gives."""
    return [_record(list(row)) for row in rows]


def _record(values: list[Any]) -> RequestRecord:
    values[STATUS] = Status(values[STATUS])
    values[BLOCKS] = tuple(values[BLOCKS])
    return RequestRecord(*values)
