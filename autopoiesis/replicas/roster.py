"""The fleet file as its owner keeps it: picker and controller read it again whenever it changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopoiesis.replicas.fleet import Member, write_fleet


class Roster:
    """Who is in the fleet, in memory and in the file."""

    def __init__(self, path: Path, members: Sequence[Member]) -> None:
        """Write the file. Raises FleetError, OSError."""
        self._path = path
        self.members: tuple[Member, ...] = ()
        self.set(members)

    def set(self, members: Sequence[Member]) -> None:
        """Replace all members. Raises FleetError and OSError, then all is as it was."""
        members = tuple(members)
        if members != self.members:
            write_fleet(self._path, members)
            self.members = members

    def change(self, name: str, **changed: Any) -> None:
        """Change fields of one member; one that is not there any more is left alone."""
        self.set([replace(m, **changed) if m.name == name else m for m in self.members])
