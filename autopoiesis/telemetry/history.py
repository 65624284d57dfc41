"""History: whole hours as Parquet files that anything reads, and what is forgotten once it lies there.

An hour is sealed when it has settled: its rows go to `history/TABLE/HOUR.parquet`, written beside and
renamed, and the ledger `sealed` says so. What is older than its retention is deleted in the transaction that
notes it as forgotten, and only if the file holds every row of it. So a kill at any moment loses
nothing and doubles nothing: what was not noted is done again.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection as Connection

from autopoiesis.atomic import replaced
from autopoiesis.telemetry.database import TelemetryError, first_sentence
from autopoiesis.telemetry.owner import Owner

HOUR_S = 3600.0
SETTLE_S = HOUR_S
"""How long after its end an hour is sealed: requests are written when they end, not when they come."""
BATCH_ROWS = 50_000
MADE_BY = b"autopoiesis.store"
"""Key of a file's metadata: when the telemetry was made that it was sealed from."""

OF_WINDOWS = """window_id in (
    with hour as (
        select min(window_id) as first, max(window_id) as last
        from windows where started_s >= $since and started_s < $until
    ),
    near as (
        select distinct window_id from {table}, hour
        where window_id <= last
            and window_id > coalesce((select max(window_id) from windows, hour where window_id < first), -1)
    )
    select near.window_id from near
    asof join windows as next on near.window_id <= next.window_id
    where next.started_s >= $since and next.started_s < $until)"""
"""Rows of the hour's windows; what was said of a window that never closed goes with the next one."""
OF_SYNTHESES = "synthesis in (select synthesis from syntheses where started_s >= $since and started_s < $until)"


@dataclass(frozen=True, slots=True)
class Group:
    """A table whose rows have a time, and those whose rows go with them."""

    head: str
    time: str
    is_detail: bool = False
    """It has a row per request or per scrape."""
    number: str = ""
    """Column that is counted on; the hour with the greatest stays, so that nothing is counted anew."""
    belonging: dict[str, str] = field(default_factory=dict[str, str])
    """Table → its rows of an hour."""

    def tables(self) -> Iterator[tuple[str, str]]:
        """Yield each table with its rows between `$since` and `$until`; the head last."""
        for table, rows in self.belonging.items():
            yield table, rows.format(table=table)
        yield self.head, f"{self.time} >= $since and {self.time} < $until"


GROUPS = (
    Group("requests", "arrived_s", is_detail=True),
    Group("replicas", "at_s", is_detail=True),
    Group("windows", "started_s", number="window_id", belonging=dict.fromkeys(
        ("cells", "arm_estimates", "allocations", "twin_errors", "prefix_errors"), OF_WINDOWS)),
    Group("syntheses", "started_s", number="synthesis", belonging={"candidates": OF_SYNTHESES}),
    Group("events", "at_s"),
    Group("plans", "created_s"),
    Group("reconfigurations", "began_s"),
)  # fmt: skip
"""What is known of arms stays: the registry forgets nothing."""
STAYS = {"candidates": "arm_id in (select id from arms)"}
"""Rows that are sealed, and never forgotten."""
SEALED = """
    select coalesce(sum(rows) filter (not forgotten), 0)::bigint, coalesce(max(part) filter (forgotten), 0) + 1
    from sealed where name = ? and hour_s = ?"""
"""Rows of an hour that lie in a file and in the store, and the part that those in the store belong to."""


class Retention(NamedTuple):
    """How long rows stay in the telemetry file [s]."""

    detail_s: float
    windows_s: float


class Hour(NamedTuple):
    """One hour of one group."""

    group: Group
    since_s: float

    def span(self) -> dict[str, float]:
        """Return the hour's ends as parameters."""
        return {"since": self.since_s, "until": self.since_s + HOUR_S}


class History:
    """Seals and forgets the hours of one store."""

    def __init__(self, owner: Owner, folder: Path) -> None:
        """`folder` is where the files go; it is made when it is needed."""
        self._owner = owner
        self._folder = folder

    def keep(self, now_s: float, retention: Retention) -> list[Path]:
        """Seal what has settled, forget what is older than its retention; return the new files.

        Raises:
            TelemetryError: a file or the ledger could not be written; what was done is done.
        """
        written: list[Path] = []
        forgotten = False
        for group in GROUPS:
            for hour in self._settled(group, now_s):
                written += self._seal(hour)
            kept_s = retention.detail_s if group.is_detail else retention.windows_s
            for hour in self._outdated(group, now_s - kept_s):
                written += self._seal(hour)
                self._owner.transact(lambda c, hour=hour: _forget(c, hour))
                forgotten = True
        if forgotten:
            self._owner.checkpoint()
        return written

    def _settled(self, group: Group, now_s: float) -> list[Hour]:
        """Return the hours that are over and later than any sealed one."""
        until_s = _whole_hour(now_s - SETTLE_S)
        ((newest_s,),) = self._owner.fetch(
            "select coalesce(max(hour_s), -1e12) from sealed where name = ?", [group.head]
        )
        return self._hours(group, newest_s + HOUR_S, until_s)

    def _outdated(self, group: Group, before_s: float) -> list[Hour]:
        hours = self._hours(group, -1e12, _whole_hour(before_s))
        if not (hours and group.number):
            return hours
        ((newest_s,),) = self._owner.fetch(
            f"select arg_max({group.time}, {group.number}) from {group.head}"  # noqa: S608
        )
        return [hour for hour in hours if hour.since_s != _whole_hour(newest_s)]

    def _hours(self, group: Group, since_s: float, until_s: float) -> list[Hour]:
        rows = self._owner.fetch(
            f"select distinct floor({group.time} / {HOUR_S}) * {HOUR_S} as hour from {group.head} "  # noqa: S608
            f"where {group.time} >= ? and {group.time} < ? order by hour",
            [since_s, until_s],
        )
        return [Hour(group, since_s) for (since_s,) in rows]

    def _seal(self, hour: Hour) -> list[Path]:
        """Write the tables whose file lacks a row, and note them; return the files."""
        entries: list[list[Any]] = []
        written: list[Path] = []
        for table, rows in hour.group.tables():
            count = f"select count(*) from {table} where {rows}"  # noqa: S608
            ((there,),) = self._owner.fetch(count, hour.span())
            ((sealed, part),) = self._owner.fetch(SEALED, [table, hour.since_s])
            if there > 0 and there != sealed:
                file, part, there = self._write(table, rows, hour, part, there)
                place = file.relative_to(self._folder.parent).as_posix()
                entries.append([table, hour.since_s, part, there, place])
                written.append(file)
        if entries:
            self._owner.transact(lambda c: _note(c, entries))
        return written

    def _write(
        self, table: str, rows: str, hour: Hour, part: int, count: int
    ) -> tuple[Path, int, int]:
        """Write the rows to a file that may be replaced; return it, its part and its number of rows."""
        ((made,),) = self._owner.fetch("select created_at from meta")
        store = made.isoformat().encode()
        while not _may_replace(file := self._file(table, hour.since_s, part), store, count):
            part += 1
        with self._owner.reader() as cursor:
            try:
                asked = cursor.sql(f"select * from {table} where {rows}", params=hour.span())  # noqa: S608
                return file, part, _write_parquet(file, asked.to_arrow_reader(BATCH_ROWS), store)
            except (duckdb.Error, OSError, pa.ArrowException) as error:
                cause = first_sentence(str(error))
                raise TelemetryError(f"{file} was not written: {cause}") from error

    def _file(self, table: str, hour_s: float, part: int) -> Path:
        name = f"{datetime.fromtimestamp(hour_s, UTC):%Y-%m-%dT%H}{f'-{part}' if part > 1 else ''}"
        return self._folder / table / f"{name}.parquet"


def _whole_hour(time_s: float) -> float:
    return time_s // HOUR_S * HOUR_S


def _may_replace(file: Path, store: bytes, count: int) -> bool:
    """Tell whether nothing is lost if the file is written anew: it is ours, and holds no more rows."""
    if not file.exists():
        return True
    try:
        there = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return False
    return (there.metadata or {}).get(MADE_BY) == store and there.num_rows <= count


def _write_parquet(file: Path, batches: Any, store: bytes) -> int:
    """Write a file whole or not at all, and to the disk; return its number of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with replaced(file) as draft, draft.open("wb") as out:
        schema = batches.schema.with_metadata({MADE_BY: store})
        with pq.ParquetWriter(out, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
        out.flush()
        os.fsync(out.fileno())
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return rows


def _note(c: Connection, entries: list[list[Any]]) -> None:
    for entry in entries:
        c.execute("delete from sealed where name = ? and hour_s = ? and not forgotten", entry[:2])
        c.execute(
            "insert into sealed (name, hour_s, part, rows, file, forgotten) values (?, ?, ?, ?, ?, false)",
            entry,
        )


def _forget(c: Connection, hour: Hour) -> None:
    """Delete an hour whose files hold all of it; where rows have come since, leave it for the next time."""
    for table, rows in hour.group.tables():
        there = c.execute(f"select count(*) from {table} where {rows}", hour.span()).fetchall()  # noqa: S608
        sealed = c.execute(SEALED, [table, hour.since_s]).fetchall()
        if there[0][0] != sealed[0][0]:
            return
    for table, rows in hour.group.tables():
        stays = STAYS.get(table, "false")
        c.execute(f"delete from {table} where {rows} and not {stays}", hour.span())  # noqa: S608
        c.execute(
            "update sealed set forgotten = true where name = ? and hour_s = ?",
            [table, hour.since_s],
        )
