"""The controller process: it owns the telemetry, runs the window loop and the control API.

`python -m autopoiesis.orchestrator.controller --run-dir DIR` is a child of `serve`. Killed at any
moment, it resumes from what the last window's transaction wrote; meanwhile the picker serves on by
the last allocation.
"""

import argparse
import asyncio
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import State
from autopoiesis.arms.registry import Registry, RegistryError
from autopoiesis.arms.sandbox.process import probe
from autopoiesis.gateway.link import Allocate, Batch, PickerLink
from autopoiesis.gateway.serving import MOST_FAULTS
from autopoiesis.gateway.settings import RunDir
from autopoiesis.orchestrator.catalogue import add_seeds
from autopoiesis.orchestrator.clock import Moment, set_between
from autopoiesis.orchestrator.control import control_app
from autopoiesis.orchestrator.control_access import Access, read_token
from autopoiesis.orchestrator.desk import Desk
from autopoiesis.orchestrator.fleet_watch import FleetWatch
from autopoiesis.orchestrator.governor import Governor
from autopoiesis.orchestrator.growing import Growing
from autopoiesis.orchestrator.holding import same_cells
from autopoiesis.orchestrator.housekeeping import keep_house
from autopoiesis.orchestrator.live_plans import live_plans
from autopoiesis.orchestrator.loop import Settled, WindowLoop
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.prefix_errors import prefix_errors
from autopoiesis.orchestrator.rails import eligible
from autopoiesis.orchestrator.recent import RecentRequests
from autopoiesis.orchestrator.recorder import ClosedWindow, Recorder
from autopoiesis.orchestrator.refit import Refits
from autopoiesis.orchestrator.registrar import Registrar
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.spans import Spans
from autopoiesis.orchestrator.status import Status
from autopoiesis.replicas.fleet import Member, read_fleet
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.records import (
    EventRow,
    GuardRails,
    OpenRequest,
    SynthesisRow,
)
from autopoiesis.telemetry.store import Store, TelemetryError
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.warm import warm_up

log = logging.getLogger(__name__)

SHORTEST_WINDOW_S = 1.0
"""An order ends the running window no sooner: a shorter one says nothing of who serves it."""
LAST_BATCH_S = 1.0
"""How long a stop waits for the picker's last records."""


class Controller:
    """The window loop with its effects: the link to the picker, the store, the synthesizer."""

    def __init__(
        self, settings: Settings, store: Store, members: tuple[Member, ...], link: PickerLink
    ) -> None:
        """Resume from the store; a stored state that does not fit is told and left behind."""
        self._settings = settings
        self._store = store
        self._link = link
        self.registry = Registry(store)
        add_seeds(self.registry)
        self._loop = self._resumed_loop()
        self.status = Status(settings, self.registry)
        self.metrics = Metrics(self.status, self.registry)
        self._spans = (
            Spans(settings.otlp_traces, lambda arm_id: self.registry.get(arm_id).name)
            if settings.otlp_traces
            else None
        )
        self._governor = Governor(self.registry, store, self.status.say, self._constrain)
        self._window = max(store.last_window(), self._last_allocated()) + 1
        self._records = RecentRequests(settings.window_s)
        self._open: tuple[OpenRequest, ...] = ()
        self._unwritten: list[Batch] = []
        self._events: list[EventRow] = []
        self._faults: Counter[str] = Counter()
        self._refitting: asyncio.Task[None] | None = None
        self._refits = Refits(
            settings.data_dir / "profiles",
            members,
            lambda subject, message: self._say(time.time(), "twin", subject, message),
        )
        self._deciding = asyncio.Lock()
        """Held while the loop decides in its thread: arms do not change under it."""
        self._reconsider = asyncio.Event()
        self._plans = live_plans(
            settings,
            members,
            self._refits.spec,
            self.registry,
            store,
            self._stored_state(),
            lambda name, message: self._say(time.time(), "fleet", name, message),
            self._reconsider.set,
        )
        self._proposal = ""
        self._recorder = Recorder(store, link.acknowledge, self._say_of_telemetry)
        self._growing = Growing(
            settings,
            store,
            self.registry,
            members,
            self._loop,
            self._governor,
            self.status,
            self.metrics,
            self._deciding,
            self._say,
        )
        self._fleet = FleetWatch(
            members,
            self._refits.spec,
            self._plans,
            self._say,
            self._capacity_changed,
            (self._refits.follow, self._growing.follow),
        )
        self.desk = Desk(
            self.registry,
            Registrar(self.registry, self._tell, store.clock),
            self._governor,
            self.status,
            self._deciding,
            link,
            self._reconsider.set,
            self.spare,
            self._keep_cycle,
            self._plans,
            self._tell,
        )

    def _resumed_loop(self) -> WindowLoop:
        settings = self._settings
        arguments = (self.registry, settings.objective, settings.seed, settings.loop)
        try:
            return WindowLoop(*arguments, self._stored_state())
        except (ValueError, KeyError) as error:
            log.warning("What the loop had learned cannot be used and is learned anew: %s", error)
            return WindowLoop(*arguments)

    def _stored_state(self) -> dict[str, NDArray[Any]]:
        try:
            return self._store.load_state()
        except TelemetryError as error:
            log.warning("What was learned cannot be read and is learned anew: %s", error)
            return {}

    def _last_allocated(self) -> int:
        allocation = self._store.load_allocation()
        return allocation.window if allocation else -1

    # --- the course of time -------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve window after window until `stop` is set."""
        began = Moment.now()
        self._records.recall(self._store, began.wall_s)
        self._allocate(began.wall_s)
        beside = [
            asyncio.create_task(self._listen(), name="listen to the picker"),
            asyncio.create_task(self._probe_isolation(), name="probe the sandbox"),
        ]
        watching = self._fleet.follow(RunDir(self._settings.run_dir).fleet)
        beside.append(asyncio.create_task(watching, name="watch the fleet"))
        housekeeping = keep_house(self._store, self._settings, self._say_of_telemetry)
        beside.append(asyncio.create_task(housekeeping, name="keep the history"))
        if self._spans:
            beside.append(asyncio.create_task(self._spans.run(), name="send spans"))
        while not stop.is_set():
            await self._end_of_window(began.steady_s, stop)
            if stop.is_set():
                await asyncio.sleep(LAST_BATCH_S)
            ended = Moment.now()
            by_s = set_between(began, ended)
            if by_s:
                self._follow_clock(ended.wall_s, by_s)
            await self._close_window(began.wall_s + by_s, ended.wall_s)
            began = ended
        await self._plans.close()
        beside += [task for task in (self._growing.task, self._refitting) if task]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)

    async def _end_of_window(self, began_s: float, stop: asyncio.Event) -> None:
        """Wait until the window that began at `began_s` (monotonic) is over: due, ended early, or all is to stop."""
        reasons = [asyncio.create_task(e.wait()) for e in (stop, self._reconsider)]
        left_s = began_s + self._settings.window_s - time.monotonic()
        await asyncio.wait(reasons, timeout=max(left_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        for reason in reasons:
            reason.cancel()
        if self._reconsider.is_set() and not stop.is_set():
            await asyncio.sleep(max(began_s + SHORTEST_WINDOW_S - time.monotonic(), 0.0))
        self._reconsider.clear()

    def _follow_clock(self, now_s: float, by_s: float) -> None:
        """Move what is remembered with the clock, so that the running windows are judged as if it had not been set."""
        self._say(now_s, "clock", "", f"the clock of this machine was set by {by_s:+.0f} s")
        self._records.follow_clock(by_s)
        self._loop.follow_clock(by_s)

    async def _listen(self) -> None:
        async for batch in self._link:
            self._unwritten.append(batch)
            self._records.add(batch.requests)
            self._open = batch.open_requests
            self.status.saw(batch)
            self.metrics.saw(batch)
            if self._spans:
                self._spans.saw(batch.requests)
            now_s = time.time()
            for fault in batch.faults:
                self._say(now_s, "fault", fault.arm_id, f"{fault.message} ({fault.count} times)")
                self._faults[fault.arm_id] += fault.count
            for sample in batch.replicas:
                self._fleet.saw(sample)
            self._plans.saw(batch.replicas, self.status.allocation)

    async def _probe_isolation(self) -> None:
        """Shut a process off as a slow policy's would be, and tell what held it."""
        reached, _ = await asyncio.to_thread(probe)
        self.metrics.isolated(reached)

    async def _close_window(self, started_s: float, ended_s: float) -> None:
        """Settle, write, and hand out the next allocation."""
        window = self._window
        able = self._fleet.able()
        names = [spec.name for spec in able]
        trace, outcome = observed(self._records.all(), self._open, names)
        seen = Observation(window, started_s, ended_s, trace, outcome, able)
        async with self._deciding:
            self._take_off_the_faulty(ended_s)
            settled = await asyncio.to_thread(self._loop.settle, seen)
            if self.status.allocation is not None:
                served = self.status.allocation
                lead = max(served.arms(), key=served.share)
                self._plans.consider(self._loop, window, lead, settled)
        self._window += 1
        self._allocate(ended_s, settled)
        self._records.forget(ended_s)
        if settled and settled.trigger and self._settings.synthesizer != "none":
            recent, _ = observed(self._records.all())
            self._growing.begin(settled.trigger, recent, self._fleet.specs)
        if settled:
            self._correct_the_twin(settled, ended_s)

    def _capacity_changed(self, what: str) -> None:
        """There is more or less capacity than there was: policies learn of it at once, and it is a trigger."""
        self._loop.triggers.capacity_changed(self._window, what)
        self._reconsider.set()

    def _take_off_the_faulty(self, now_s: float) -> None:
        """Quarantine arms whose decisions failed; the baseline decided instead."""
        for arm_id, count in list(self._faults.items()):
            if not arm_id or count < MOST_FAULTS:
                continue
            del self._faults[arm_id]
            try:
                reason = f"{count} of its decisions failed"
                arm = self.registry.move(arm_id, State.QUARANTINED, reason)
                self._say(now_s, "arm", arm.name, f"{arm.state}: {reason}")
            except (RegistryError, TelemetryError) as error:
                self._say(now_s, "arm", arm_id, f"not taken off after {count} faults: {error}")
                if isinstance(error, TelemetryError):  # a full disk: it is tried again
                    self._faults[arm_id] += count

    def _allocate(self, now_s: float, settled: Settled | None = None) -> None:
        """Draw the window's allocation, store it with what was settled, and send it to the picker."""
        before = self.status.allocation
        self._govern(lambda: self._governor.follow(self._window))
        allocation = self._loop.next_allocation(self._window, self._fleet.able())
        self._govern(lambda: self._governor.hold(allocation))
        why = self._loop.why(allocation, before)
        if before is None or not same_cells(before, allocation):
            self._say(now_s, "allocation", "", why)
        self._tell_proposal(now_s)
        self._link.allocate(self._message(allocation))
        self.status.allocated(allocation, why)
        if self._spans:
            self._spans.allocated(allocation)
        if settled is None:
            self._govern(lambda: self._store.write_allocation(allocation))
            return
        batches, self._unwritten = self._unwritten, []
        plans, planned, changes = self._plans.collect()
        for event in planned:
            self.status.say(event)
        events, self._events = [*planned, *self._events], []
        state = self._loop.state() | self._plans.state()
        missed = prefix_errors(settled.window.window, batches)
        closed = ClosedWindow(settled, allocation, batches, events, state, plans, changes, missed)
        self.status.settled(settled, events)
        self.metrics.settled(settled)
        if not self._recorder.record(closed):
            self.metrics.store_failed()
        self.metrics.windows_waiting.set(len(self._recorder))
        self.status.scores(self._store)

    def _message(self, allocation: Allocation) -> Allocate:
        """Return an allocation with all that the picker needs to serve by it."""
        baseline = self._loop.control()
        arms = [baseline, *(self.registry.get(arm_id) for arm_id in allocation.arms())]
        return Allocate(
            allocation,
            {arm.id: arm.source for arm in arms},
            self._settings.objective,
            {arm.id: arm.slow_id for arm in arms if arm.slow},
            baseline.id,
            tuple(arm.id for arm in eligible(self.registry.serving(), self._loop.rails)),
        )

    def _govern(self, change: Callable[[], None]) -> None:
        """Change what is in force; where that cannot be stored, it is tried again in the next window."""
        try:
            change()
        except TelemetryError as error:
            log.error("%s", error)

    def _constrain(self, rails: GuardRails) -> None:
        self._loop.constrain(rails)
        self.status.guard_rails = rails

    def _tell_proposal(self, now_s: float) -> None:
        """In a dry run, say what would serve, whenever that changes."""
        proposed = self._loop.proposed
        told = proposed[1] if proposed else ""
        if told and told != self._proposal:
            self._say(now_s, "dry-run", "", told)
        self._proposal = told

    def _correct_the_twin(self, settled: Settled, now_s: float) -> None:
        window = settled.window
        why = self._refits.wanted(
            now_s, settled.twin_errors, window.drift.split(","), window.completed
        )
        if why is None:
            return
        self._say(now_s, "twin", "", f"the profiles are fitted again: {why}")
        whole_until_s = min((o.arrived_s for o in self._open), default=now_s)
        fitting = self._refits.run(self._settings.data_dir, time.time, whole_until_s)
        self._refitting = asyncio.create_task(fitting, name="fit the twin")

    def spare(self) -> Spare:
        """Tell whether the fleet has time to spare."""
        return self._fleet.spare(self._open, self._settings.llm.idle_below)

    def _keep_cycle(self, row: SynthesisRow, by: str) -> int:
        """Write and count a cycle that somebody ran by hand. Raises TelemetryError."""
        number = self._store.write_synthesis(row)
        self.metrics.synthesized(row)
        self._tell(row.synthesizer, f"synthesis {number} {by}: {row.error or row.conclusion}")
        return number

    def _tell(self, subject: str, message: str) -> None:
        """Tell of an order at once, not only when the window ends."""
        event = EventRow(time.time(), "operator", self._window, subject, message)
        self._store.write_events([event])
        self.status.say(event)

    def _say_of_telemetry(self, message: str) -> None:
        self._say(time.time(), "telemetry", "", message)

    def _say(self, at_s: float, kind: str, subject: str, message: str) -> None:
        event = EventRow(at_s, kind, self._window, subject, message)
        self._events.append(event)
        self.status.say(event)


async def _main(run_dir: Path) -> None:
    settings = Settings.of_running(run_dir)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    members = read_fleet(RunDir(run_dir).fleet)
    with Store.open(settings.telemetry_file) as store:
        async with PickerLink(RunDir(run_dir).link_socket) as link:
            controller = Controller(settings, store, members, link)
            access = Access(settings.control_host, read_token(settings.data_dir))
            app = control_app(store, controller.desk, access, controller.metrics)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, settings.control_host, settings.control_port).start()
            try:
                await controller.run(stop)
            finally:
                await runner.cleanup()


def main() -> None:
    """Run the controller of a `serve` instance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    run_dir: Path = parser.parse_args().run_dir
    warm_up()
    asyncio.run(_main(run_dir))


if __name__ == "__main__":
    main()
