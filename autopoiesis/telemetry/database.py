"""Opening the telemetry file: one owner, a schema with versions, and an engine with its doors shut.

Everything a query could misuse is closed when the file is opened: no other file, no extension, no
Python variable, no spilling to disk, and the configuration is locked. The order matters: DuckDB
refuses some of these settings once external access is off.
"""

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection as Connection

MIGRATIONS = ("schema.sql", "schema_2.sql", "schema_3.sql", "schema_4.sql")
"""Package files; file n brings schema version n to n + 1."""
SCHEMA_VERSION = len(MIGRATIONS)

MEMORY_LIMIT = "512MB"
THREADS = 2
"""The store shares its machine with the picker."""


class TelemetryError(RuntimeError):
    """The telemetry cannot be opened, read or written: one sentence and what to do."""


def open_database(
    path: Path, *, memory_limit: str = MEMORY_LIMIT, clock: Callable[[], float] = time.time
) -> Connection:
    """Open the file for writing, as its only owner, and bring its schema up to date.

    Raises:
        TelemetryError: another process owns it, it is damaged, foreign or from the future.
    """
    connection = _connect(path, read_only=False, memory_limit=memory_limit)
    with _closed_on_failure(connection, path):
        _migrate(connection, path, clock)
        _shut_doors(connection)
    return connection


def open_for_reading(path: Path, *, memory_limit: str = MEMORY_LIMIT) -> Connection:
    """Open the file of a stopped instance; nothing in it is changed, not even its write-ahead log.

    Raises:
        TelemetryError: there is none, another process owns it, it is damaged, foreign or newer.
    """
    if not path.exists():
        raise TelemetryError(f"There is no telemetry at {path} yet; run `autopoiesis serve` first.")
    connection = _connect(path, read_only=True, memory_limit=memory_limit)
    with _closed_on_failure(connection, path):
        if _version(connection, path) == 0:
            raise TelemetryError(f"{path} holds no telemetry; run `autopoiesis serve` first.")
        _shut_doors(connection)
    return connection


@contextmanager
def _closed_on_failure(connection: Connection, path: Path) -> Generator[None]:
    """Close a connection that cannot be used after all, and say why in a `TelemetryError`."""
    try:
        yield
    except duckdb.Error as error:
        connection.close()
        raise explain(path, error) from error
    except TelemetryError:
        connection.close()
        raise


def _connect(path: Path, *, read_only: bool, memory_limit: str) -> Connection:
    try:
        return duckdb.connect(
            str(path),
            read_only=read_only,
            config={
                "memory_limit": memory_limit,
                "threads": THREADS,
                "temp_directory": "",
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "allow_community_extensions": False,
            },
        )
    except duckdb.Error as error:
        raise explain(path, error) from error


def _shut_doors(connection: Connection) -> None:
    connection.execute("set timezone = 'UTC'")
    connection.execute("set allowed_directories = []")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def _version(connection: Connection, path: Path) -> int:
    """Return the file's schema version, 0 if it has none; refuse one that is newer than ours."""
    tables = {
        name for (name,) in connection.execute("select table_name from duckdb_tables()").fetchall()
    }
    if "meta" not in tables:
        if tables:
            raise TelemetryError(f"{path} is a DuckDB file, but not of ours; choose another place.")
        return 0
    row = connection.execute("select schema_version from meta").fetchone()
    version = int(row[0]) if row else 0
    if version > SCHEMA_VERSION:
        raise TelemetryError(
            f"{path} has schema version {version}, this autopoiesis knows up to {SCHEMA_VERSION}; "
            "upgrade autopoiesis or choose another --data-dir."
        )
    return version


def _migrate(connection: Connection, path: Path, clock: Callable[[], float]) -> None:
    """Bring schema and views up to date; a file that is so already is not written to, a full disk or not."""
    version = _version(connection, path)
    views = package_sql("views.sql")
    views_hash = sha256(views.encode()).hexdigest()
    if version == SCHEMA_VERSION and _views_hash(connection) == views_hash:
        return
    connection.begin()
    for step in MIGRATIONS[version:]:
        connection.execute(package_sql(step))
    if version == 0:
        connection.execute(
            "insert into meta (schema_version, engine_version, created_at) values (?, ?, ?)",
            [
                SCHEMA_VERSION,
                duckdb.__version__,
                datetime.fromtimestamp(clock(), UTC).replace(tzinfo=None),
            ],
        )
    elif version < SCHEMA_VERSION:
        connection.execute("update meta set schema_version = ?", [SCHEMA_VERSION])
    connection.execute(views)
    connection.execute("update meta set views = ?", [views_hash])
    connection.commit()
    if version < SCHEMA_VERSION:
        connection.checkpoint()


def _views_hash(connection: Connection) -> str:
    row = connection.execute("select views from meta").fetchone()
    return str(row[0]) if row else ""


def package_sql(name: str) -> str:
    """Return the text of one of the package's SQL files."""
    return (files("autopoiesis.telemetry") / name).read_text(encoding="utf-8")


def explain(path: Path, error: duckdb.Error) -> TelemetryError:
    """Say in one sentence what an engine error means for the operator, and what to do."""
    text = str(error)
    cause = first_sentence(text)
    if "Could not set lock" in text:
        pid = re.search(r"PID (\d+)", text)
        owner = f"process {pid[1]}" if pid else "another process"
        return TelemetryError(
            f"{path} is in use by {owner}; stop it first, or choose another --data-dir."
        )
    if "not a valid DuckDB database file" in text:
        return TelemetryError(
            f"{path} is no DuckDB file; move it away or choose another --data-dir."
        )
    if "WAL" in text and "Corrupt" in text:
        return TelemetryError(
            f"The write-ahead log of {path} is damaged; `python -m autopoiesis.telemetry.recovery "
            f"{path}` sets it aside and keeps all windows before the damage."
        )
    if "Corrupt" in text or "Could not read enough bytes" in text:
        return TelemetryError(
            f"{path} is damaged ({cause}); move it away or restore a copy, then start again."
        )
    if "Could not write" in text or "Cannot open file" in text:
        return TelemetryError(
            f"{path} cannot be written ({cause}); free disk space or choose another --data-dir."
        )
    if "version number" in text:
        return TelemetryError(
            f"{path} was written by another DuckDB than {duckdb.__version__} ({cause}); "
            "upgrade duckdb or choose another --data-dir."
        )
    return TelemetryError(f"The telemetry in {path} cannot be used: {cause}")


def first_sentence(text: str) -> str:
    """Return an engine message without its kind, its quoted source line and its line breaks."""
    head = re.split(r"\n\s*\n|\nLINE ", text, maxsplit=1)[0]
    head = re.sub(r"^(?:TransactionContext |[A-Z][A-Za-z ]*? )?Error: ", "", head.strip())
    return " ".join(head.replace('""', '"').split())
