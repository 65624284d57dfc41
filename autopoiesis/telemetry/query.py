"""Anybody's SQL on the telemetry: one SELECT, read-only, within limits of time, rows and memory.

What keeps a query harmless; each part is there because the others leave a hole: one parsed
statement that is a SELECT, or the EXPLAIN of one; no function that acts on the engine or runs other
SQL; a read-only transaction, always rolled back (a CTE may hold a DELETE); no files, no extensions,
a locked configuration (`telemetry.database`); a timer; caps on rows and on the size of a value.
"""

import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection as Connection
from duckdb import Statement, StatementType

from autopoiesis.telemetry.answers import (
    JSONValue,
    QueryResult,
    TooLargeError,
    as_json,
    format_result,
)
from autopoiesis.telemetry.database import first_sentence, open_for_reading

__all__ = ["QueryError", "QueryResult", "format_result", "query_file", "run_query"]

MAX_ROWS = 1000
TIMEOUT_S = 10.0
MAX_CHARACTERS = 20_000
"""Of a query: planning a much longer one takes long and cannot be interrupted."""
CHUNK_ROWS = 500

ACTING_FUNCTIONS = frozenset(
    {
        "checkpoint",
        "create_external_resource",
        "deregister_external_resource",
        "destroy_external_resource",
        "disable_logging",
        "disable_profiling",
        "enable_logging",
        "enable_profiling",
        "force_checkpoint",
        "json_execute_serialized_sql",
        "nextval",
        "query",
        "query_table",
        "register_external_resource",
        "register_external_resource_type",
        "setseed",
        "setval",
        "sleep_ms",
        "truncate_duckdb_logs",
        "write_log",
    }
)
"""Functions that do something, or run SQL that was not looked at."""

EXPLAIN = re.compile(r"\s*explain(\s+analyze)?(\s*\([^()]*\))?\s", re.IGNORECASE)
FUNCTION_NAME = re.compile(r'"function_name":"([^"\\]*)"')


class QueryError(ValueError):
    """The query is refused, wrong or too costly: one sentence."""


def query_file(
    path: Path, sql: str, max_rows: int = MAX_ROWS, timeout_s: float = TIMEOUT_S
) -> QueryResult:
    """Run one guarded query on the file of a stopped instance.

    Raises:
        QueryError: the query is refused, wrong or too costly.
        TelemetryError: the file cannot be opened.
    """
    connection = open_for_reading(path)
    try:
        return run_query(connection, sql, max_rows, timeout_s)
    finally:
        connection.close()


def run_query(
    connection: Connection, sql: str, max_rows: int = MAX_ROWS, timeout_s: float = TIMEOUT_S
) -> QueryResult:
    """Run one guarded query on a connection that nobody else uses meanwhile.

    Raises:
        QueryError: the query is refused, wrong or too costly.
    """
    started = time.perf_counter()
    expired = threading.Event()
    try:
        with _time_limit(connection, timeout_s, expired):
            statement = _only_statement(connection, sql)
            with _read_only(connection):
                connection.execute(statement)
                described = connection.description or []
                rows, truncated = _rows(connection, max_rows)
    except TooLargeError as error:
        raise QueryError(str(error)) from error
    except duckdb.InterruptException as error:
        raise QueryError(
            f"The query took longer than {timeout_s:g} s and was stopped; narrow it, by window_id for example."
            if expired.is_set()
            else "The query was stopped, because telemetry needed its memory or is closing; try again."
        ) from error
    except duckdb.OutOfMemoryException as error:
        raise QueryError(
            "The query needs more memory than it may have; filter or aggregate first."
        ) from error
    except duckdb.Error as error:
        raise QueryError(_sentence(str(error))) from error
    return QueryResult(
        columns=tuple(column[0] for column in described),
        types=tuple(str(column[1]) for column in described),
        rows=rows,
        truncated=truncated,
        seconds=time.perf_counter() - started,
    )


def _only_statement(connection: Connection, sql: str) -> Statement:
    """Return the one statement that `sql` is, if it only asks."""
    if len(sql) > MAX_CHARACTERS:
        raise QueryError(
            f"A query may have {MAX_CHARACTERS:,} characters, this one has {len(sql):,}."
        )
    if "\0" in sql or any("\ud800" <= character <= "\udfff" for character in sql):
        raise QueryError("A query is text in UTF-8, without zero characters.")
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"Ask with exactly one SELECT; these are {len(statements)} statements.")
    statement = asked = statements[0]
    if statement.type == StatementType.EXPLAIN and (prefix := EXPLAIN.match(statement.query)):
        inner = connection.extract_statements(statement.query[prefix.end() :])
        asked = inner[0] if len(inner) == 1 else statement
    if asked.type != StatementType.SELECT:
        raise QueryError(
            f"Only SELECT (or EXPLAIN of one) is allowed here, not {asked.type.name}; telemetry is read-only."
        )
    _refuse_acting_functions(connection, asked.query)
    return statement


def _refuse_acting_functions(connection: Connection, select: str) -> None:
    row = connection.execute("select json_serialize_sql(?)", [select]).fetchone()
    tree = row[0] if row else ""
    if '"error":false' not in tree[:40]:
        raise QueryError("This kind of SELECT cannot be checked; write it as a plain SELECT.")
    called = {name.lower() for name in FUNCTION_NAME.findall(tree)}
    if acting := sorted(called & ACTING_FUNCTIONS):
        raise QueryError(f"{acting[0]}() may not be called here; telemetry is read-only.")


@contextmanager
def _time_limit(
    connection: Connection, timeout_s: float, expired: threading.Event
) -> Generator[None]:
    def stop() -> None:
        expired.set()
        connection.interrupt()

    timer = threading.Timer(timeout_s, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _read_only(connection: Connection) -> Generator[None]:
    connection.execute("begin transaction read only")
    try:
        yield
    finally:
        with suppress(duckdb.Error):
            connection.rollback()


def _rows(connection: Connection, max_rows: int) -> tuple[list[list[JSONValue]], bool]:
    """Return at most `max_rows` rows, and whether there are more."""
    rows: list[list[JSONValue]] = []
    while len(rows) <= max_rows:
        chunk = connection.fetchmany(min(CHUNK_ROWS, max_rows + 1 - len(rows)))
        if not chunk:
            return rows, False
        rows += [[as_json(value) for value in row] for row in chunk]
    return rows[:max_rows], True


def _sentence(text: str) -> str:
    if "pytz" in text:
        return "A TIMESTAMP WITH TIME ZONE cannot be shown; cast it, as in now()::timestamp."
    if "read-only mode" in text:
        return "Telemetry is read-only; this would change it."
    if "file system operations are disabled" in text or "disabled by configuration" in text:
        return "A query may not touch files; ask the telemetry's own tables."
    return first_sentence(text)
