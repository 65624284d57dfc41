"""`control fleet` and the orders to replicas: only a running instance can obey them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autopoiesis.orchestrator.capacity import Standing
from autopoiesis.orchestrator.control_access import read_token
from autopoiesis.orchestrator.control_client import RefusedError, call
from autopoiesis.orchestrator.fleet_orders import FleetCommand
from autopoiesis.orchestrator.registrar import Said
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import running_control_url

LOOK_EVERY_S = 0.5
MOVING = frozenset({Standing.STARTING, Standing.DRAINING})

Replicas = list[dict[str, Any]]


class FleetChangeError(RuntimeError):
    """A replica could not be changed: one sentence."""


class RunningFleet:
    """The fleet of the instance that runs."""

    def __init__(self, settings: Settings) -> None:
        """Raises RefusedError if none runs, NoTokenError if its token is not for us to read."""
        url = running_control_url(settings.data_dir)
        if url is None:
            raise RefusedError(
                f"No instance runs in {settings.data_dir}; start one with `autopoiesis serve`."
            )
        self._url, self._token = url, read_token(settings.data_dir)

    def replicas(self) -> Replicas:
        """Return every replica with what it does. Raises TelemetryError if the instance does not answer."""
        return list(call(self._url, self._token, "/fleet")["replicas"])

    def order(self, command: FleetCommand, said: Said) -> list[str]:
        """Give an order; return whom it is for, in the order of their turns. Raises RefusedError, TelemetryError."""
        body = {"replicas": command.replicas} | asdict(command.limits) | asdict(said)
        return list(call(self._url, self._token, f"/fleet/{command.order}", body)["replicas"])

    def wait(self, names: Sequence[str], tell: Callable[[str], None]) -> Replicas:
        """Wait until an order is carried out, telling every step; return the replicas then.

        Raises:
            FleetChangeError: a replica could not be changed.
        """
        before: dict[str, str] = {}
        while True:
            replicas = {str(r["replica"]): r for r in self.replicas()}
            now = {name: _does(replicas[name]) for name in names if name in replicas}
            for name, does in now.items():
                if before.get(name) != does:
                    tell(f"{name}: {does}")
            before = now
            for name in now:
                if error := replicas[name]["error"]:
                    raise FleetChangeError(f"{name} could not be changed: {error}")
            if not any(_is_busy(replicas[name]) for name in now):
                return list(replicas.values())
            time.sleep(LOOK_EVERY_S)


def _is_busy(replica: Mapping[str, Any]) -> bool:
    return bool(replica["ordered"]) or replica["standing"] in MOVING


def _does(replica: Mapping[str, Any]) -> str:
    waits = f", waits to {replica['ordered']}" if replica["ordered"] else ""
    return f"{replica['standing']}{waits}"
