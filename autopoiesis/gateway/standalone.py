"""The picker alone, for a gateway that is somebody else's: one fixed arm, a fixed fleet, a TCP port.

It serves the endpoint picker protocol of Kubernetes' Gateway API Inference Extension, keeps the
same accounts as the whole gateway does, and writes no telemetry.
"""

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Callable, Sequence

import numpy as np

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway import protocol
from autopoiesis.gateway.background import keep_up
from autopoiesis.gateway.calls import HEALTH, Call, Caller, HealthCheck, Server
from autopoiesis.gateway.endpoint_picker import EndpointPicker
from autopoiesis.gateway.inference_extension import InferenceExchange
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.membership import Member
from autopoiesis.gateway.settings import LARGEST_BODY_BYTES
from autopoiesis.gateway.state import GatewayState
from autopoiesis.gateway.watch import ReplicaWatch
from autopoiesis.telemetry.records import ReplicaSample, RequestRecord

log = logging.getLogger(__name__)

PORT = 9002
"""Where the extension's gateways look for a picker."""
SWEEP_S = 60.0

Say = Callable[[str], None]


class StandalonePicker:
    """Serves until told to stop."""

    def __init__(
        self,
        arm: tuple[str, Program],
        members: Sequence[Member],
        say: Say,
        on_record: Callable[[RequestRecord], None] = lambda _record: None,
    ) -> None:
        """`arm` is its id and program; `on_record` is told of each request that ended."""
        self.state = GatewayState(Objective(), arm, np.random.default_rng(), time.monotonic)
        self.ledger = Ledger(self.state, on_record)
        self.service = EndpointPicker(self.state, self.ledger, secrets.token_bytes(32))
        self._watch = ReplicaWatch(self.state.membership, self.ledger, self)
        self._members = tuple(members)
        self._say = say

    async def run(
        self, host: str, port: int, tls: tuple[bytes, bytes] | None, stop: asyncio.Event
    ) -> None:
        """Listen and serve; OSError if the port is taken."""
        server = Server(
            {protocol.PROCESS: self._exchange, HEALTH: self._health},
            LARGEST_BODY_BYTES + (1 << 20),
        )
        self.state.set_members(self._members)
        taken = await server.listen_on_port(host, port, tls)
        self._watch.follow(self._members)
        tasks = [
            asyncio.create_task(keep_up(work, self.fault))
            for work in (self.service.tick, self._sweep)
        ]
        how = "TLS" if tls else "plain text"
        self._say(f"The picker is ready on {host}:{taken} ({how}), {len(self._members)} replicas.")
        await stop.wait()
        for task in tasks:
            task.cancel()
        self._watch.stop()
        await server.close()

    def sampled(self, sample: ReplicaSample) -> None:
        """A replica was polled; nobody keeps it here."""

    def changed(self) -> None:
        """A replica is away or back: held requests may have a place now."""
        self.service.release()

    def silent(self, replica: str, for_s: float) -> None:
        """A replica answers nothing; the gateway has timeouts of its own."""

    def fault(self, arm_id: str, message: str) -> None:
        """Say what went wrong."""
        self._say(f"Arm {arm_id}: {message}" if arm_id else message)

    def _exchange(self, call: Call) -> Caller:
        return InferenceExchange(self.service, call)

    def _health(self, call: Call) -> Caller:
        def always() -> bool:
            return True

        named = dict.fromkeys(("", "liveness", "readiness"), always)
        extension = protocol.PROCESS.split("/")[1]
        return HealthCheck(call, {**named, extension: always})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.ledger.sweep()


async def serve(
    picker: StandalonePicker, host: str, port: int, tls: tuple[bytes, bytes] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; OSError if the port is taken."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await picker.run(host, port, tls, stop)
