"""What each replica is to do, and what became of it: two files between the controller and the replicas' parent.

The controller decides and writes targets; the supervisor, whose children the replicas are, follows them
and appends a line for each change that it has made. Both files survive either of them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.replicas.limits import Limits
from autopoiesis.telemetry.records import Reconfiguration


class Want(StrEnum):
    """What a replica is to do."""

    ON = "on"
    OFF = "off"
    ASLEEP = "asleep"
    """Its process stays, its GPU's memory is free."""


@dataclass(frozen=True, slots=True)
class Target:
    """What one replica is to do, and how."""

    want: Want = Want.ON
    limits: Limits = field(default_factory=Limits)
    restart: int = 0
    """Counts the restarts that were asked for: another number asks for one more."""


class TargetFile:
    """The targets by replica; a replica that is not in it is to run as it was started first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Target]:
        """Return the targets; none where there is no file, or none that can be read."""
        try:
            told = orjson.loads(self._path.read_bytes())
            return {str(name): target_from(value) for name, value in told.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def write(self, targets: Mapping[str, Target]) -> None:
        """Replace the targets. Raises OSError."""
        plain = {name: asdict(target) for name, target in sorted(targets.items())}
        write_atomically(self._path, orjson.dumps(plain))


def target_from(value: Any) -> Target:
    """Read a target's plain values; ValueError, TypeError or KeyError if they are others."""
    return Target(Want(value["want"]), Limits(**value["limits"]), int(value["restart"]))


class ChangeLog:
    """The changes that were made, oldest first, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._first_s = 0.0
        self._count = 0
        self._skip = (0.0, 0)

    def append(self, change: Reconfiguration) -> None:
        """Add a change. Raises OSError."""
        with self._path.open("ab") as file:
            file.write(orjson.dumps(change) + b"\n")

    @property
    def heard(self) -> tuple[float, int]:
        """When the first change of this log began, and how many have been returned."""
        return self._first_s, self._count

    def skip(self, first_s: float, count: int) -> None:
        """Return no changes that another reader of this log has `heard`; of another log, return all."""
        self._skip = (first_s, count)

    def new(self) -> list[Reconfiguration]:
        """Return what has been added since the last call; a line that is not whole yet waits."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        changes: list[Reconfiguration] = []
        for line in whole.splitlines():
            with suppress(ValueError, TypeError):
                changes.append(Reconfiguration(**cast("dict[str, Any]", orjson.loads(line))))
        heard = 0
        if changes and not self._count:
            self._first_s = changes[0].began_s
            heard = self._skip[1] if self._skip[0] == self._first_s else 0
        self._count += len(changes)
        return changes[heard:]
