"""Synthesis beside the windows: one cycle at a time, from a trigger to new arms in shadow."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.fleet_watch import specs_of
from autopoiesis.orchestrator.governor import Governor
from autopoiesis.orchestrator.growing_plans import PlanningBrief, planning_brief
from autopoiesis.orchestrator.growth import (
    LESSONS,
    RACE_WORTH,
    brief_of,
    errand_of,
    lessons_of,
    take_in,
)
from autopoiesis.orchestrator.loop import WindowLoop
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import Status
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.replicas.fleet import Member
from autopoiesis.synthesis.archive import from_archive
from autopoiesis.synthesis.brief import Brief, BriefError, Lesson
from autopoiesis.synthesis.launch import run_worker
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.store import Store, TelemetryError
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

log = logging.getLogger(__name__)

Say = Callable[[float, str, str, str], None]
"""Called with the time, the kind, the subject and the text of an event."""


class Growing:
    """Runs synthesis cycles and takes in what they bring."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registry: Registry,
        members: Sequence[Member],
        loop: WindowLoop,
        governor: Governor,
        status: Status,
        metrics: Metrics,
        deciding: asyncio.Lock,
        say: Say,
    ) -> None:
        """`deciding` is held while arms change, so that the loop does not decide meanwhile."""
        self.task: asyncio.Task[None] | None = None
        """The cycle that runs, or the last one."""
        self._settings = settings
        self._store = store
        self._registry = registry
        self._members = tuple(members)
        self._met = {member.name: member for member in members}
        """Everybody who was in the fleet."""
        self._plans_next = settings.plan_control == "on"
        self._loop = loop
        self._governor = governor
        self._status = status
        self._metrics = metrics
        self._deciding = deciding
        self._say = say

    def follow(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet."""
        self._members = tuple(members)
        self._met |= {member.name: member for member in members}

    def begin(self, trigger: Trigger, recent: Trace, fleet: Sequence[ReplicaSpec]) -> None:
        """Begin a cycle on recent requests, or say why it cannot begin."""
        serving = self._registry.serving()
        known = [arm.id for arm in self._registry.fast() if arm not in serving]
        try:
            brief = brief_of(
                trigger, recent, fleet, serving, known, self._settings, self._lessons()
            )
        except BriefError as error:
            self._say(trigger.at_s, "synthesis", trigger.kind, f"not asked: {error}")
            return
        self._loop.triggers.began()
        cycle = self._cycle(brief, trigger, serving, fleet)
        self.task = asyncio.create_task(cycle, name="synthesis")

    async def _cycle(
        self, brief: Brief, trigger: Trigger, serving: Sequence[Arm], fleet: Sequence[ReplicaSpec]
    ) -> None:
        """Run a cycle. Where plans are carried out and enough is known, every other one judges slow functions, too.

        Those take longer, and fast functions must not wait for them.
        """
        asked = PlanningBrief(brief, {})
        if self._plans_next:
            asked = await asyncio.to_thread(self._with_plans, brief, serving, fleet)
        brief, remark = from_archive(asked.brief, self._settings.data_dir / "archive.json")
        if remark:
            self._say(trigger.at_s, "synthesis", "archive", remark)
        self._plans_next = self._settings.plan_control == "on" and not brief.yards
        await self._synthesize(replace(asked, brief=brief))

    def _with_plans(
        self, brief: Brief, serving: Sequence[Arm], fleet: Sequence[ReplicaSpec]
    ) -> PlanningBrief:
        present = {spec.name for spec in fleet}
        left = [member for member in list(self._met.values()) if member.name not in present]
        allocation = self._status.allocation
        leading = max(allocation.arms(), key=allocation.share) if allocation else ""
        places = (*fleet, *specs_of(left))
        try:
            return planning_brief(
                brief, serving, leading, places, self._settings, self._store, brief.asked_s
            )
        except (BriefError, QueryError, TelemetryError) as error:
            log.info("Slow functions stay as they are in this cycle: %s", error)
            return PlanningBrief(brief, {})

    def _lessons(self) -> tuple[Lesson, ...]:
        try:
            return lessons_of(self._store.query(LESSONS))
        except (QueryError, TelemetryError) as error:
            log.warning("Earlier lessons cannot be read: %s", error)
            return ()

    async def _synthesize(self, asked: PlanningBrief) -> None:
        """Let a worker work on the brief and take in what it brings."""
        self._status.synthesis_began(time.time())
        fleet = {member.name: member.url for member in self._members}
        errand = errand_of(self._settings, self._settings.control_url, fleet)
        try:
            row = asked.by_arm(await run_worker(asked.brief, errand=errand))
            self._metrics.synthesized(row)
            self._store.write_synthesis(row)
            self._say(time.time(), "synthesis", row.synthesizer, row.error or row.conclusion)
            async with self._deciding:
                held = self._governor.rails.hold
                for arm, gain in take_in(row, self._registry, time.time(), into_shadow=not held):
                    if not held:
                        self._loop.welcome(arm.id, row.beaten or None, gain, RACE_WORTH)
                    self._say(time.time(), "arm", arm.name, f"{arm.state}: {arm.reason}")
        except TelemetryError as error:
            log.error("%s", error)
            self._metrics.store_failed()
            told = f"what was synthesized is lost: {error}"
            self._say(time.time(), "telemetry", "", told)
        finally:
            self._loop.triggers.ended(time.time())
            self._status.synthesis_ended()
