"""The picker process: `python -m autopoiesis.gateway.picker --run-dir DIR`.

It decides for Envoy, follows every request to its end, polls the replicas, and talks to the
controller. It holds nothing that cannot be lost: killed and started again, it reads the fleet and
the last allocation from the run directory and goes on.
"""

import argparse
import asyncio
import gc
import logging
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import uvloop

from autopoiesis.arms.arm import arm_id
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.atomic import write_atomically
from autopoiesis.gateway import protocol
from autopoiesis.gateway.access_log import AccessLog, read_entry
from autopoiesis.gateway.background import keep_up
from autopoiesis.gateway.calls import Call, Caller, Server
from autopoiesis.gateway.endpoint_picker import LEAST_PATIENCE_S, EndpointPicker
from autopoiesis.gateway.endpoints import write_endpoints
from autopoiesis.gateway.exchange import Exchange
from autopoiesis.gateway.files import read_or_create_secret
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.link import Allocate, LinkError, LinkServer, Outbox, decode_line
from autopoiesis.gateway.protocol import Message
from autopoiesis.gateway.settings import LARGEST_BODY_BYTES, RunDir
from autopoiesis.gateway.state import GatewayState
from autopoiesis.gateway.tokenizer import chars_per_token
from autopoiesis.gateway.warm import warm_up
from autopoiesis.gateway.watch import ReplicaWatch
from autopoiesis.replicas.fleet import FleetError, Member, read_fleet
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample

log = logging.getLogger(__name__)

BASELINE = "least-requests"
"""Name of the human arm that serves until there is an allocation, and where no other can till then."""
FLEET_POLL_S = 1.0
SWEEP_S = 60.0
GRACE_S = 1.0
"""Wait for what is left of an access log whose stream has ended."""
LARGEST_MESSAGE = LARGEST_BODY_BYTES + (1 << 20)


class Picker:
    """Everything in the process, wired together."""

    def __init__(self, run_dir: RunDir, least_patience_s: float = LEAST_PATIENCE_S) -> None:
        self.run_dir = run_dir
        self.outbox = Outbox(open_requests=self.open_requests)
        arm = next(arm for arm in seed_arms() if arm.name == BASELINE)
        self._programs: dict[str, Program] = {arm.id: compile_policy(verify(arm.source))}
        self.state = GatewayState(
            Objective(), (arm.id, self._programs[arm.id]), np.random.default_rng(), time.monotonic
        )
        self.ledger = Ledger(self.state, self.outbox.add_request)
        salt = read_or_create_secret(run_dir.salt)
        self.service = EndpointPicker(self.state, self.ledger, salt, least_patience_s)
        self.link = LinkServer(self.outbox, self.allocate)
        self.watch = ReplicaWatch(self.state.membership, self.ledger, self)
        self._members: tuple[Member, ...] | None = None
        """Who was in the fleet when its file was read last, None before."""
        self._log_streams = 0
        self._asking: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop."""
        self.read_fleet()
        self.read_allocation()
        services = {
            protocol.PROCESS: self._exchange,
            protocol.STREAM_ACCESS_LOGS: self._access_log,
        }
        server = Server(services, LARGEST_MESSAGE)
        await self.link.start(self.run_dir.link_socket)
        await server.listen_on_socket(self.run_dir.picker_socket)
        log.info("The picker is ready on %s", self.run_dir.picker_socket)
        tasks = [
            asyncio.create_task(keep_up(work, self.fault))
            for work in (self.service.tick, self.link.run, self._watch_fleet, self._sweep)
        ]
        await stop.wait()
        for task in (*tasks, *([self._asking] if self._asking else [])):
            task.cancel()
        self.watch.stop()
        await self.link.close()
        await server.close()

    # --- what the controller and the supervisor say -------------------------------------------

    def allocate(self, message: Allocate) -> None:
        """Serve by a new allocation, and by it again after a restart."""
        self._apply(message)
        write_atomically(self.run_dir.allocation, message.encode())

    def read_allocation(self) -> None:
        """Take up the allocation by which the picker served before; without one the baseline serves."""
        try:
            self._apply(Allocate.decode(decode_line(self.run_dir.allocation.read_bytes())))
        except FileNotFoundError:
            pass
        except (OSError, LinkError) as error:
            self.fault("", f"the last allocation cannot be read, the baseline serves: {error}")

    def read_fleet(self) -> None:
        """Take up who is in the fleet, and tell Envoy if that has changed."""
        try:
            members = tuple(m for m in read_fleet(self.run_dir.fleet) if m.serves)
        except FleetError as error:
            self.fault("", f"the fleet cannot be read, it stays as it was: {error}")
            return
        if members == self._members:
            return
        if self._members is not None:
            write_endpoints(self.run_dir, members)
        self._members = members
        self.state.set_members(members)
        self.watch.follow(members)
        if members and self._asking is None:
            self._asking = asyncio.create_task(self._ask_tokenizer(members[0].address))

    async def _ask_tokenizer(self, address: str) -> None:
        """Start counting tokens as the fleet's model does."""
        if ratio := await chars_per_token(address):
            self.ledger.start_from(ratio)

    def open_requests(self) -> tuple[OpenRequest, ...]:
        """Return what is in flight or held."""
        waiting = (
            flight for queue in self.state.held.queues() for flight in self.state.held.of(queue)
        )
        members = self.state.membership
        return tuple(
            flight.as_open(members.name_of(flight.replica), members.progress.tokens(flight.replica))
            for flight in (*self.ledger.flights(), *waiting)
        )

    def fault(self, arm_id: str, message: str) -> None:
        """Note something that went wrong."""
        log.warning("%s%s", f"Arm {arm_id}: " if arm_id else "", message)
        self.outbox.add_fault(arm_id, message)

    def _apply(self, message: Allocate) -> None:
        programs: dict[str, Program] = {}
        for id_ in dict.fromkeys((*message.allocation.arms(), message.baseline)):
            if id_ and (program := self._program(id_, message)):
                programs[id_] = program
        self.state.set_objective(message.objective)
        if message.baseline in programs:
            self.state.set_baseline(message.baseline, programs[message.baseline])
        allocation = message.allocation
        self.state.allocate(allocation.window, allocation.cells, programs, message.standing)

    def _program(self, id_: str, message: Allocate) -> Program | None:
        """Return an arm's program; nothing is served that does not verify, whoever sent it."""
        if id_ not in self._programs:
            try:
                policy = verify(message.arms.get(id_, ""))
            except PolicyError as error:
                self.fault(id_, f"its policy does not verify: {error}")
                return None
            if arm_id(policy.id, message.slow_ids.get(id_, "")) != id_:
                self.fault(id_, f"its source is that of {policy.id}")
                return None
            self._programs[id_] = compile_policy(policy)
        return self._programs[id_]

    # --- what the replicas say ----------------------------------------------------------------

    def sampled(self, sample: ReplicaSample) -> None:
        """Tell the controller how a replica is."""
        self.outbox.add_sample(sample)

    def changed(self) -> None:
        """A replica is away or back: held requests may have a place now."""
        self.service.release()

    def silent(self, replica: str, for_s: float) -> None:
        """A replica that is away has answered nothing for so long."""
        if count := self.service.silent(replica, for_s):
            self.fault(
                "", f"{count} streams that stalled on {replica} for {for_s:.0f} s were ended"
            )

    # --- what Envoy says ----------------------------------------------------------------------

    def _exchange(self, call: Call) -> Caller:
        return Exchange(self.service, call)

    def _access_log(self, call: Call) -> Caller:
        self._log_streams += 1
        return AccessLog(call, self._endings, self._log_ended)

    def _endings(self, entries: Message) -> None:
        for entry in entries:
            self._ended(entry)
        self.service.release()

    def _log_ended(self) -> None:
        self._log_streams -= 1
        if not self._log_streams:  # whoever told the end of these requests is gone
            orphans = self.ledger.flights()
            asyncio.get_running_loop().call_later(GRACE_S, self._envoy_gone, orphans)

    def _ended(self, entry: Message) -> None:
        try:
            if ending := read_entry(entry):
                self.ledger.close(ending)
                if ending.load:
                    replica = self.state.membership.at_address(ending.address)
                    self.state.membership.report_load(replica, ending.load)
        except Exception:
            log.exception("An access-log entry could not be read")
            self.fault("", "an access-log entry could not be read")

    def _envoy_gone(self, orphans: list[Flight]) -> None:
        if count := self.ledger.abandon(orphans):
            self.fault("", f"Envoy went away with {count} requests in flight")

    # --- housekeeping -------------------------------------------------------------------------

    async def _watch_fleet(self) -> None:
        while True:
            await asyncio.sleep(FLEET_POLL_S)
            self.read_fleet()
            for (id_, message), count in self.state.faults.untold.items():
                self.outbox.add_fault(id_, message, count)
            self.state.faults.untold.clear()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.ledger.sweep()


async def _serve(run_dir: RunDir, least_patience_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    picker = Picker(run_dir, least_patience_s)
    gc.collect()
    gc.freeze()  # what is there now stays; the collector need not look at it again
    await picker.run(stop)


def main(arguments: list[str] | None = None) -> int:
    """Run the process."""
    parser = argparse.ArgumentParser(
        prog="python -m autopoiesis.gateway.picker", description=__doc__
    )
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="where fleet.json and the sockets are"
    )
    parser.add_argument(
        "--patience-s",
        type=float,
        default=LEAST_PATIENCE_S,
        help="shortest time without a byte before a second replica is asked, too",
    )
    chosen = parser.parse_args(arguments)
    run_dir = chosen.run_dir.resolve()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not run_dir.is_dir():
        sys.stderr.write(f"There is no run directory {run_dir}; `autopoiesis serve` makes one.\n")
        return 2
    warm_up()
    with suppress(KeyboardInterrupt):
        uvloop.run(_serve(RunDir(run_dir), chosen.patience_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
