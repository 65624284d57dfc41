"""`replay`: what is asked on the command line, put to the twin, with progress."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.files import read_arm
from autopoiesis.arms.registry import Registry, RegistryError
from autopoiesis.arms.seeds import seed_arms, slow_seed_arms
from autopoiesis.orchestrator.growth import brief_of, errand_of, promoted_with_gain
from autopoiesis.orchestrator.replay import Newcomer, ReplayReport, Request, replay
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.synthesis.brief import BriefError
from autopoiesis.synthesis.launch import run_worker_now
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.capacity_trace import START_UP, StartUp, fleet_course, read_capacity
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace, TraceError, read_trace
from autopoiesis.twin.warm import warm_up


def traffic_and_fleet(
    settings: Settings, trace_file: Path, replicas: int, speed: float, for_s: float | None
) -> tuple[Trace, list[ReplicaSpec]]:
    """Read what a trace file is to send, at that speed and for that long, and to which replicas.

    Raises:
        TraceError: the file cannot be read, or no request is left of it.
    """
    trace = read_trace(trace_file).speed(speed)
    if for_s is not None:
        trace = trace.slice(0.0, for_s)
    if not len(trace):
        raise TraceError(f"{trace_file}: no request is left of it; use a longer --for.")
    names = settings.profile
    fleet = [ReplicaSpec(f"replica-{i}", profile(names[i % len(names)])) for i in range(replicas)]
    return trace, fleet


def replay_command(
    settings: Settings,
    trace_file: Path,
    *,
    replicas: int,
    speed: float,
    arms: Sequence[str],
    online: bool,
    evolve: bool,
    for_s: float | None,
    quiet: bool,
    capacity_file: Path | None = None,
    notice_s: float = 0.0,
    start_up_s: float | None = None,
) -> ReplayReport:
    """Replay a trace file under the arms asked for; every human one if none is.

    A capacity file takes and gives replicas meanwhile; `speed` speeds both files up.
    """
    trace, fleet = traffic_and_fleet(settings, trace_file, replicas, speed, for_s)
    _refuse_what_none_can_serve(trace_file, trace, fleet)
    course = None
    if capacity_file is not None:
        start_up = START_UP if start_up_s is None else StartUp(start_up_s, 0.0)
        capacity = read_capacity(capacity_file).speed(speed)
        course = fleet_course(
            capacity, replicas, settings.seed, notice_s=notice_s, start_up=start_up
        )
    chosen = find_arms(settings, arms) if arms else seed_arms()
    warm_up()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("replay", total=1.0)
        return replay(
            trace,
            fleet,
            chosen,
            settings.objective,
            settings.seed,
            online=online,
            evolve=_evolve(settings) if evolve else None,
            window_s=settings.window_s,
            settings=settings.loop,
            progress=lambda what, done: bar.update(task, description=what, completed=done),
            course=course,
        )


def _refuse_what_none_can_serve(file: Path, trace: Trace, fleet: Sequence[ReplicaSpec]) -> None:
    """Raise a TraceError for a trace that the twin cannot run, or of which nothing would be served."""
    kv_block = fleet[0].profile.kv_block_tokens
    if len(trace.blocks) and trace.block_tokens % kv_block:
        raise TraceError(
            f"{file}: its prefix blocks of {trace.block_tokens} tokens are not whole KV blocks of "
            f"{kv_block}; convert it to a multiple."
        )
    largest = max(fleet, key=lambda replica: replica.profile.kv_tokens).profile
    needed = trace.input_tokens + trace.output_tokens
    if int(needed.min()) > largest.kv_tokens:
        i = int(needed.argmin())
        raise TraceError(
            f"{file}: every request is longer than the largest KV cache, {largest.kv_tokens} tokens "
            f"of {largest.name}; the shortest, request {i + 1}, has {needed[i]}."
        )


def _evolve(settings: Settings) -> Callable[[Request], list[Newcomer]]:
    """Return a synthesizer that runs a worker and waits for it."""

    def synthesize(request: Request) -> list[Newcomer]:
        try:
            brief = brief_of(
                request.trigger, request.recent, request.replicas, request.arms, (), settings
            )
        except BriefError:
            return []
        row = run_worker_now(brief, errand=errand_of(settings))
        return [
            Newcomer(arm, row.beaten or None, gain)
            for arm, gain in promoted_with_gain(row, time.time())
        ]

    return synthesize


def find_arms(settings: Settings, keys: Sequence[str]) -> list[Arm]:
    """Find arms by file, or by id or name among the seeds and the arms of the data directory."""
    return arms_by_key(keys, lambda: _registry(settings))


def arms_by_key(keys: Sequence[str], among: Callable[[], Registry]) -> list[Arm]:
    """Find arms by file, or by id or name in a registry that is only opened if it is needed."""
    known: Registry | None = None
    found: list[Arm] = []
    for key in keys:
        path = Path(key)
        if path.suffix in {".py", ".policy"}:
            try:
                found.append(read_arm(path, time.time()))
            except OSError as error:
                raise RegistryError(f"Cannot read the policy {path}: {error.strerror}.") from None
            continue
        known = known or among()
        found.append(known.get(key))
    for arm in found:
        if not arm.source:
            raise RegistryError(f"{arm.name} has only slow functions; it decides on no request.")
    return found


class _Stored:
    """The arms of a stopped instance, and the seeds; nothing is written back."""

    def __init__(self, settings: Settings) -> None:
        self._arms = {arm.id: arm for arm in (*seed_arms(), *slow_seed_arms())}
        if settings.telemetry_file.exists():
            with Store.open(settings.telemetry_file) as store:
                self._arms |= {arm.id: arm for arm in store.load_arms()}

    def load_arms(self) -> list[Arm]:
        """Return all arms."""
        return list(self._arms.values())

    def save_arm(self, arm: Arm) -> None:
        """Keep a change for this run."""
        self._arms[arm.id] = arm


def _registry(settings: Settings) -> Registry:
    return Registry(_Stored(settings))
