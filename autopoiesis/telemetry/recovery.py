"""A damaged write-ahead log: set it aside and keep every window before the damage."""

import re
import shutil
import sys
from pathlib import Path

import duckdb

from autopoiesis.telemetry.database import TelemetryError, open_for_reading


def set_wal_aside(path: Path) -> Path:
    """Move the damaged write-ahead log of `path` aside and return where it went.

    The transactions before the damaged place are kept as a shorter log; where that does not open
    either, the file goes back to its last checkpoint.

    Raises:
        TelemetryError: there is no log, or the file itself cannot be opened.
    """
    wal = path.with_name(path.name + ".wal")
    if not wal.exists():
        raise TelemetryError(f"{path} has no write-ahead log to set aside.")
    damage = _place_of_damage(path)
    aside = _free_name(wal)
    wal.rename(aside)
    if damage is not None:
        shutil.copyfile(aside, wal)
        with wal.open("r+b") as log:
            log.truncate(damage)
        if _place_of_damage(path) is not None:
            wal.unlink()
    open_for_reading(path).close()
    return aside


def _place_of_damage(path: Path) -> int | None:
    """Return the byte of the log's first damaged entry, None if it replays or says nothing."""
    try:
        duckdb.connect(str(path), read_only=True).close()
    except duckdb.Error as error:
        if "Could not set lock" in str(error):
            raise TelemetryError(f"{path} is in use; stop its owner first.") from error
        place = re.search(r"byte position (\d+)", str(error))
        return int(place[1]) if place else 0
    return None


def _free_name(wal: Path) -> Path:
    number = 1
    while (aside := wal.with_name(f"{wal.name}.damaged-{number}")).exists():
        number += 1
    return aside


def main() -> None:
    """Run as `python -m autopoiesis.telemetry.recovery FILE`."""
    if len(sys.argv) != 2:
        sys.exit("Usage: python -m autopoiesis.telemetry.recovery TELEMETRY_FILE")
    try:
        aside = set_wal_aside(Path(sys.argv[1]))
    except TelemetryError as error:
        sys.exit(str(error))
    sys.stdout.write(f"The damaged log is now {aside}; the telemetry opens again.\n")


if __name__ == "__main__":
    main()
