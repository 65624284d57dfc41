"""Replicas that come and go without us: a file that somebody else writes, and names in DNS.

Both are looked at again every few seconds. What is new is asked who it is before it gets traffic; what is
listed no more, or said to be leaving, gets no new requests from then on.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autopoiesis.orchestrator.first_fleet import check_alike, remote_members
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import FleetError, Member
from autopoiesis.replicas.fleet_list import DNS, FleetListError, Listed, read_fleet_list, resolve
from autopoiesis.replicas.probe import ProbeError, Server, probe
from autopoiesis.replicas.roster import Roster
from autopoiesis.twin.latency import profile

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Known:
    """A listed replica that has answered."""

    listed: Listed
    server: Server


class Discovery:
    """Who is in a fleet of servers that others run."""

    def __init__(self, settings: Settings, say: Say) -> None:
        """`say` is told of every replica that comes, goes, or cannot be taken in."""
        self._names = tuple(url for url in settings.replica if url.startswith(DNS))
        fixed = tuple(url for url in settings.replica if not url.startswith(DNS))
        self._settings = settings.model_copy(update={"replica": fixed})
        self._file = settings.fleet_file
        self._say = say
        self._fixed: tuple[Member, ...] = ()
        self._known: dict[str, _Known] = {}
        self._listed: dict[str, tuple[Listed, ...]] = {}
        """Source → what it listed last."""
        self._told: dict[str, str] = {}
        """Source or URL → the trouble with it that was told."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to look at again."""
        return bool(self._names or self._file)

    async def first(self) -> tuple[Member, ...]:
        """Return who is there at the start.

        Raises:
            ProbeError: a server that was given by its URL does not answer, or none of all does.
        """
        self._fixed = await remote_members(self._settings)
        members = await self.look()
        if not members:
            why = next(iter(self._told.values()), "nothing is listed")
            raise ProbeError(f"No replica is there yet: {why}")
        return members

    async def run(self, roster: Roster) -> None:
        """Look again and again until cancelled."""
        while self.changes:
            await asyncio.sleep(self._settings.discover_s)
            members = await self.look()
            if not members:
                self._tell("", "no replica is listed any more; those that were stay in the fleet")
                continue
            self._told.pop("", None)
            self._tell_changes(roster.members, members)
            try:
                roster.set(members)
            except (FleetError, OSError) as error:
                self._tell("roster", f"the fleet stays as it was: {error}")

    async def look(self) -> tuple[Member, ...]:
        """Return who is listed now and has answered."""
        listed = {one.url: one for one in await self._read()}
        self._known = {
            url: replace(known, listed=listed[url])
            for url, known in self._known.items()
            if url in listed
        }
        await self._meet([one for url, one in listed.items() if url not in self._known])
        taken = {member.address for member in self._fixed}
        found = [
            m for known in self._known.values() if (m := self._member(known)).address not in taken
        ]
        return (*self._fixed, *{m.address: m for m in found}.values())

    async def _read(self) -> list[Listed]:
        """Return what all sources list; what cannot be read lists what it listed before."""
        for name in self._names:
            try:
                self._listed[name] = await resolve(name)
                self._told.pop(name, None)
            except FleetListError as error:
                self._tell(name, str(error))
        if self._file is not None:
            try:
                self._listed["file"] = read_fleet_list(self._file)
                self._told.pop("file", None)
            except FleetListError as error:
                self._tell("file", str(error))
        return [one for listed in self._listed.values() for one in listed]

    async def _meet(self, new: Sequence[Listed]) -> None:
        """Ask those that are new who they are; who does not answer is asked again the next time."""
        answers = await asyncio.gather(*(probe(one.url) for one in new), return_exceptions=True)
        for one, answer in zip(new, answers, strict=True):
            if isinstance(answer, ProbeError):
                self._tell(one.url, str(answer))
                continue
            if isinstance(answer, BaseException):
                raise answer
            try:
                others = [known.server for known in self._known.values()]
                check_alike([*others[:1], answer])
                profile(one.profile or self._settings.profile[0])
            except (ProbeError, ValueError) as error:
                self._tell(one.url, str(error))
                continue
            self._known[one.url] = _Known(one, answer)
            self._told.pop(one.url, None)

    def _member(self, known: _Known) -> Member:
        one, address = known.listed, known.server.address
        return Member(
            re.sub(r"[^A-Za-z0-9.]+", "-", address).strip("-")[:63],
            address,
            one.profile or self._settings.profile[0],
            one.speed,
            kind="remote",
            leaving=one.leaving,
            kv_events=one.kv_events,
        )

    def _tell_changes(self, before: Sequence[Member], after: Sequence[Member]) -> None:
        old, new = {m.name: m for m in before}, {m.name: m for m in after}
        for name in new.keys() - old.keys():
            self._say(f"{name} has joined the fleet")
        for name in old.keys() - new.keys():
            self._say(f"{name} has left the fleet")

    def _tell(self, subject: str, trouble: str) -> None:
        """Say what is wrong, once."""
        if self._told.get(subject) != trouble:
            self._told[subject] = trouble
            self._say(trouble)
