"""The one connection that owns the telemetry file: transactions, and readers beside them."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection as Connection

from autopoiesis.telemetry.database import TelemetryError, first_sentence

STOP_EVERY_S = 0.05


class Owner:
    """The owner of a database file. Every method may be called from any thread."""

    def __init__(self, name: str, opened: Callable[[], Connection]) -> None:
        self._name = name
        self._opened = opened
        self._connection: Connection | None = opened()
        self._writing = threading.RLock()
        self._reading = threading.Condition()
        self._readers: list[Connection] = []

    def transact(self, write: Callable[[Connection], None]) -> None:
        """Run `write` in one transaction: all of it or nothing.

        Where memory is short because of somebody's query, the query is stopped, not the write.

        Raises:
            TelemetryError: nothing was written; the owner stays usable.
        """
        with self._writing:
            try:
                try:
                    self._attempt(write)
                except duckdb.OutOfMemoryException:
                    self._stop_readers()
                    self._attempt(write)
            except duckdb.Error as error:
                raise TelemetryError(self._unwritten(error)) from error

    def _unwritten(self, error: duckdb.Error) -> str:
        cause = first_sentence(str(error)).rstrip(".")
        lacks = "Could not write" in cause or isinstance(error, duckdb.OutOfMemoryException)
        advice = "; free disk space or memory, then it goes on." if lacks else "."
        return f"Nothing of this was written to {self._name}: {cause}{advice}"

    def _attempt(self, write: Callable[[Connection], None]) -> None:
        connection = self._live()
        try:
            connection.begin()
            write(connection)
            connection.commit()
        except BaseException:
            self._undo(connection)
            raise

    def _undo(self, connection: Connection) -> None:
        """Roll back; where a failed commit has left the engine unusable, open the file anew."""
        with suppress(duckdb.Error):
            connection.rollback()
        try:
            connection.execute("select 1").fetchall()
        except duckdb.Error:
            self._stop_readers()
            connection.close()
            self._connection = None
            with suppress(TelemetryError):
                self._connection = self._opened()

    def _live(self) -> Connection:
        """Return the connection; after a failure that closed it, try to open the file again."""
        if self._connection is None:
            self._connection = self._opened()
        return self._connection

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the file, if nothing stands in the way."""
        with self._writing, suppress(duckdb.Error):
            self._live().checkpoint()

    def fetch(
        self, query: str, parameters: Sequence[object] | Mapping[str, object] = ()
    ) -> list[Any]:
        """Return all rows of one of our own queries, beside whatever is being written."""
        with self.reader() as cursor:
            try:
                return cursor.execute(query, parameters).fetchall()
            except duckdb.Error as error:
                raise TelemetryError(
                    f"Telemetry could not be read from {self._name}: {first_sentence(str(error))}"
                ) from error

    @contextmanager
    def reader(self) -> Generator[Connection]:
        """Lend a connection of the reader's own; it is closed afterwards."""
        with self._reading:
            if self._connection is None:
                raise TelemetryError(f"The telemetry in {self._name} is closed.")
            cursor = self._connection.cursor()
            self._readers.append(cursor)
        try:
            yield cursor
        finally:
            cursor.close()
            with self._reading:
                self._readers.remove(cursor)
                self._reading.notify_all()

    def _stop_readers(self, patience_s: float = 5.0) -> None:
        """Interrupt all readers until they are gone or patience ends."""
        with self._reading:
            for _ in range(int(patience_s / STOP_EVERY_S)):
                for reader in self._readers:
                    reader.interrupt()
                if not self._readers:
                    return
                self._reading.wait(STOP_EVERY_S)

    def close(self) -> None:
        """Stop all readers and let go of the file."""
        with self._writing:
            self._stop_readers()
            with self._reading:
                if self._connection is not None:
                    self._connection.close()
                self._connection = None
                self._opened = self._refuse

    def _refuse(self) -> Connection:
        raise TelemetryError(f"The telemetry in {self._name} is closed.")
