"""`synthesize`: one cycle by hand, on a trace, on stored windows, or again from a record."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from autopoiesis.arms.arm import Arm, Origin
from autopoiesis.arms.seeds import seed_arms, slow_seed_arms
from autopoiesis.gateway.settings import RunDir
from autopoiesis.orchestrator.catalogue import ask_telemetry
from autopoiesis.orchestrator.control_access import NoTokenError
from autopoiesis.orchestrator.control_client import RefusedError
from autopoiesis.orchestrator.growth import LESSONS, brief_of, errand_of, lessons_of
from autopoiesis.orchestrator.orders import ordering
from autopoiesis.orchestrator.plan_features import Durations
from autopoiesis.orchestrator.reconfigurations import durations_of
from autopoiesis.orchestrator.registrar import NewArm, Said
from autopoiesis.orchestrator.replay_command import traffic_and_fleet
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.orchestrator.startup import CannotStartError
from autopoiesis.orchestrator.stored import stored_arms, stored_fleet, stored_requests_between
from autopoiesis.orchestrator.supervisor import running_control_url
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.orchestrator.yards import cut_with_capacity, paired, planning_budget_s
from autopoiesis.replicas.fleet import read_fleet
from autopoiesis.synthesis.archive import from_archive
from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.launch import run_worker
from autopoiesis.synthesis.llm.clerk import Errand
from autopoiesis.synthesis.llm.exchange import read_recording
from autopoiesis.synthesis.step import promoted_arms
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.telemetry.store import TelemetryError
from autopoiesis.twin.capacity_trace import CapacityTrace, read_capacity
from autopoiesis.twin.latency import profile
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

USUAL_WINDOWS = 12
FEWEST_WINDOWS = 3
"""Two to race on and one for the hold-out."""
MOST_REQUESTS = 100_000
"""Read from the telemetry."""
LOOK_EVERY_S = 0.2
FIRST_FAST, FIRST_SLOW = "least-tokens", "threshold"
"""The human arms with which all slow ones, and all fast ones, are paired."""

Tell = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class CycleReport:
    """A cycle and what was made of it."""

    row: SynthesisRow
    kept: str
    """Where it was written down, in a sentence."""
    failed: bool = False
    """Whether it could not be carried out, or did not repeat what was recorded."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        names = (
            "trigger",
            "synthesizer",
            "promoted",
            "seconds",
            "cpu_seconds",
            "tokens",
            "cost_usd",
        )
        told = {name: getattr(self.row, name) for name in (*names, "conclusion", "error")}
        candidates = [
            _verdict(c) | {"model": c.model, "tokens": c.tokens, "cost_usd": c.cost_usd}
            for c in self.row.candidates
        ]
        return told | {"candidates": candidates}


def _verdict(candidate: CandidateRow) -> dict[str, Any]:
    names = ("verdict", "gate", "gain", "gain_low", "gain_high", "reason")
    return {"id": candidate.arm_id} | {name: getattr(candidate, name) for name in names}


def synthesize_on_trace(
    settings: Settings,
    trace_file: Path,
    *,
    replicas: int,
    speed: float,
    for_s: float | None,
    quiet: bool,
    capacity_file: Path | None = None,
    allow_unsandboxed: bool = False,
) -> CycleReport:
    """Run one cycle on the newest windows of a trace, against the human arms; nothing is kept.

    With a capacity file, slow functions are judged too: `replicas` GPUs come and go as it says.
    """
    trace, fleet = traffic_and_fleet(settings, trace_file, replicas, speed, for_s)
    trigger = Trigger("operator", 0, time.time(), f"asked by hand on {trace.name}")
    if capacity_file is None:
        brief = brief_of(trigger, trace, fleet, seed_arms(), (), settings)
    else:
        capacity = read_capacity(capacity_file).speed(speed)
        brief = _planning_brief(settings, trigger, trace, capacity, fleet)
        brief = replace(brief, allow_unsandboxed=allow_unsandboxed)
    row = _run(brief, errand_of(settings, *_instance(settings)), None, quiet)
    return CycleReport(row, "Nothing was written down: the traffic is a trace's.", bool(row.error))


def synthesize_on_windows(settings: Settings, windows: int, *, by: str, quiet: bool) -> CycleReport:
    """Run one cycle on the newest stored windows, against the serving arms, on behalf of `by`.

    The cycle is written to the telemetry, of a running instance or a stopped one, and of a stopped one also
    to the archive. What is promoted becomes a candidate in the registry.
    """
    if windows < FEWEST_WINDOWS:
        raise SettingsError(
            f"A cycle needs at least {FEWEST_WINDOWS} windows; give more with --windows."
        )
    brief = _stored_brief(settings, windows)
    if running_control_url(settings.data_dir) is None:
        brief, _ = from_archive(brief, settings.data_dir / "archive.json")
    row = _run(brief, errand_of(settings, *_instance(settings)), None, quiet)
    return CycleReport(row, _keep(settings, row, by), bool(row.error))


def _planning_brief(
    settings: Settings,
    trigger: Trigger,
    trace: Trace,
    capacity: CapacityTrace,
    fleet: Sequence[ReplicaSpec],
) -> Brief:
    """Ask for policies that would have served and planned better where GPUs come and go."""
    profiles = [profile(name) for name in settings.profile]
    windows, holdout, yards = cut_with_capacity(
        trace, capacity, profiles, len(fleet), settings.window_s, _durations(settings)
    )
    fast = sorted(seed_arms(), key=lambda arm: arm.name != FIRST_FAST)
    slow = sorted(slow_seed_arms(), key=lambda arm: arm.name != FIRST_SLOW)
    return Brief(
        trigger=f"{trigger.kind}: {trigger.why}",
        objective=settings.objective,
        replicas=tuple(fleet),
        windows=windows,
        holdout=holdout,
        incumbents=paired(fast, slow),
        seed=settings.seed,
        budget_s=planning_budget_s(settings),
        warmup_s=settings.window_s,
        synthesizer=Origin(settings.synthesizer),
        folder=str(settings.data_dir / "synthesis"),
        policies_asked=settings.llm.policies,
        yards=yards,
    )


def _durations(settings: Settings) -> Durations:
    """Return what changes have taken on this instance's fleet, or what is assumed where it had none yet."""
    assumed = Durations(load_s=30.0, engine_s=20.0, drain_s=10.0, stop_s=2.0)
    try:
        return durations_of(lambda query: ask_telemetry(settings, query, 10), assumed)
    except (QueryError, TelemetryError):
        return assumed


def repeat_recorded(path: Path, *, quiet: bool) -> CycleReport:
    """Run a recorded cycle again with the models' recorded replies, and compare the verdicts."""
    recording = read_recording(path)
    row = _run(recording.brief, None, path, quiet)
    if recording.end is None:
        return CycleReport(
            row, "The record has no end to compare with: that cycle was stopped.", bool(row.error)
        )
    recorded = [_verdict(CandidateRow(**c)) for c in recording.end["row"]["candidates"]]
    same = recorded == [_verdict(candidate) for candidate in row.candidates]
    kept = f"The {len(recorded)} candidates and their verdicts are those of the record, to the last digit."
    if not same:
        kept = "The verdicts differ from those of the record: it was made by another version, or is damaged."
    return CycleReport(row, kept, failed=bool(row.error) or not same)


def _run(brief: Brief, errand: Errand | None, recording: Path | None, quiet: bool) -> SynthesisRow:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(f"synthesis ({brief.synthesizer})", total=brief.budget_s)
        return asyncio.run(
            _watched(brief, errand, recording, lambda s: bar.update(task, completed=s))
        )


async def _watched(
    brief: Brief, errand: Errand | None, recording: Path | None, tell: Tell
) -> SynthesisRow:
    """Run a worker and tell the time that it has used."""
    began_s = time.monotonic()
    running = asyncio.create_task(run_worker(brief, errand=errand, recording=recording))
    while not running.done():
        await asyncio.wait({running}, timeout=LOOK_EVERY_S)
        tell(min(time.monotonic() - began_s, brief.budget_s))
    return await running


def _instance(settings: Settings) -> tuple[str, dict[str, str]]:
    """Return the control URL and the replicas of the instance that runs on the data directory."""
    url = running_control_url(settings.data_dir)
    if url is None:
        return "", {}
    return url, {m.name: m.url for m in read_fleet(RunDir(settings.run_dir).fleet)}


def _stored_brief(settings: Settings, windows: int) -> Brief:
    """Make a brief from the telemetry of an instance, running or stopped."""

    def ask(query: str) -> list[Any]:
        return list(ask_telemetry(settings, query, MOST_REQUESTS).rows)

    spans = ask(
        "select window_id, started_s, ended_s from windows where requests > 0 "  # noqa: S608
        f"order by window_id desc limit {windows + 1}"
    )
    if len(spans) <= FEWEST_WINDOWS:
        raise BriefError(
            f"There are {len(spans)} stored windows with requests; let the instance serve for longer."
        )
    from_s, to_s = float(spans[-1][1]), float(spans[0][2])
    recent, _ = observed(stored_requests_between(settings, from_s, to_s))
    names = ask(
        f"select replica from replicas where at_s >= {from_s!r} group by replica order by min(rowid)"  # noqa: S608
    )
    arms = stored_arms(settings)
    serving = [arm for arm in arms if arm.serves] or seed_arms()
    known = [arm.id for arm in arms if arm not in serving]
    last = int(spans[0][0])
    return brief_of(
        Trigger("operator", last, time.time(), f"asked by hand on the windows up to {last}"),
        recent,
        stored_fleet(settings, [str(name) for (name,) in names]),
        serving,
        known,
        settings.model_copy(update={"window_s": (to_s - from_s) / len(spans)}),
        lessons_of(ask_telemetry(settings, LESSONS, MOST_REQUESTS)),
        windows,
    )


def _keep(settings: Settings, row: SynthesisRow, by: str) -> str:
    """Write a cycle to the telemetry, of a running instance or a stopped one; make candidates of what it promotes."""
    promoted = promoted_arms(row, time.time())
    try:
        with ordering(settings) as orders:
            number = orders.keep_cycle(row, Said(by))["synthesis"]
            for arm in promoted:
                orders.add_arm(_new_arm(arm), Said(by, f"promoted by hand: {row.trigger}"))
    except (CannotStartError, NoTokenError, TelemetryError, QueryError, RefusedError) as error:
        return f"Not everything was written down: {error}"
    kept = f"Written to the telemetry as synthesis {number}."
    if promoted:
        names = ", ".join(arm.id for arm in promoted)
        kept += f" In the registry as candidates: {names}; `arms promote ID` gives one traffic."
    return kept


def _new_arm(arm: Arm) -> NewArm:
    return NewArm(
        arm.source,
        arm.name,
        arm.origin,
        arm.created_at,
        arm.parents,
        arm.thought,
        arm.reason,
        slow=arm.slow,
        prompt=arm.prompt,
        answer=arm.answer,
    )
