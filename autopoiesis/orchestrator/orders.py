"""Orders to an instance: a running one is told on its control port, a stopped one is changed in its file."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.catalogue import add_seeds, show_guard_rails
from autopoiesis.orchestrator.control import told
from autopoiesis.orchestrator.control_access import read_token
from autopoiesis.orchestrator.control_client import call, quoted
from autopoiesis.orchestrator.governor import Command, Governor
from autopoiesis.orchestrator.registrar import NewArm, Registrar, Said, Step
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import data_directory, running_control_url
from autopoiesis.telemetry.records import EventRow, SynthesisRow
from autopoiesis.telemetry.store import Store

Told = dict[str, Any]


class Orders(Protocol):
    """What can be ordered; each returns what the control API answers."""

    def add_arm(self, new: NewArm, said: Said) -> Told:
        """Take a policy in."""
        ...

    def change_arm(self, which: str, step: Step, said: Said) -> Told:
        """Do one step to an arm."""
        ...

    def obey(self, command: Command, said: Said) -> Told:
        """Give an order that bounds what the loop may do."""
        ...

    def keep_cycle(self, cycle: SynthesisRow, said: Said) -> Told:
        """Write the account of a synthesis cycle by hand to the telemetry."""
        ...


@contextmanager
def ordering(settings: Settings) -> Generator[Orders]:
    """Lend the way to change an instance.

    Raises:
        CannotStartError: the data directory cannot be used.
        TelemetryError: the telemetry cannot be opened, or the instance does not answer.
        NoTokenError: an instance runs, but its token is not for us to read.
    """
    url = running_control_url(settings.data_dir)
    if url:
        yield _Running(url, read_token(settings.data_dir))
        return
    with data_directory(settings), Store.open(settings.telemetry_file) as store:
        yield _Stopped(store)


class _Running:
    """An instance that runs."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token

    def add_arm(self, new: NewArm, said: Said) -> Told:
        return self._call("/arms", asdict(new) | asdict(said))

    def change_arm(self, which: str, step: Step, said: Said) -> Told:
        return self._call(f"/arms/{quoted(which)}/{step}", asdict(said))

    def obey(self, command: Command, said: Said) -> Told:
        body = {"arm": command.arm, "on": command.on} | asdict(said)
        return self._call(f"/control/{command.order}", body)

    def keep_cycle(self, cycle: SynthesisRow, said: Said) -> Told:
        return self._call("/syntheses", {"cycle": asdict(cycle)} | asdict(said))

    def _call(self, path: str, body: Told) -> Told:
        return call(self._url, self._token, path, body)


class _Stopped:
    """The file of an instance that does not run; we own it meanwhile."""

    def __init__(self, store: Store) -> None:
        self._store = store
        registry = Registry(store)
        add_seeds(registry)
        self._registrar = Registrar(registry, self._say, store.clock)
        self._governor = Governor(registry, store, lambda _event: None, lambda _rails: None)

    def add_arm(self, new: NewArm, said: Said) -> Told:
        arm, is_new = self._registrar.add(new, said)
        return told(arm, new=is_new)

    def change_arm(self, which: str, step: Step, said: Said) -> Told:
        return told(self._registrar.step(which, step, said), new=False)

    def obey(self, command: Command, said: Said) -> Told:
        current = self._store.load_allocation()
        self._governor.obey(command, said, self._store.last_window(), current)
        return show_guard_rails(self._store.query)

    def keep_cycle(self, cycle: SynthesisRow, said: Said) -> Told:
        number = self._store.write_synthesis(cycle)
        told = f"synthesis {number} {said.of('run')}: {cycle.error or cycle.conclusion}"
        self._say(cycle.synthesizer, told)
        return {"synthesis": number}

    def _say(self, subject: str, message: str) -> None:
        event = EventRow(
            self._store.clock(), "operator", self._store.last_window(), subject, message
        )
        self._store.write_events([event])
