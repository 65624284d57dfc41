"""Yards for a synthesis cycle: a trace and a capacity trace cut alike, and the ways to run a model on what there is."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from autopoiesis.arms.arm import Arm, arm_id, text_id
from autopoiesis.orchestrator.plan_features import Durations
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.synthesis.brief import BriefError, Incumbent
from autopoiesis.twin.capacity_trace import CapacityTrace
from autopoiesis.twin.latency import Profile
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.yard import GpuCourse, Way, Yard, everything

WINDOWS_EACH = 12
"""Windows of the planner in one window of the race: plans need time to pay off."""
HOLDOUT_EVERY = 3
PLANNING_TIME = 3.0
"""How many times the usual budget a cycle has that judges plans: planners are asked in processes of their own."""

_NAME = re.compile(r"(?P<gpu>[^-]+)-(?P<model>.+)-tp(?P<width>\d+)(-[^-]+)?")


def planning_budget_s(settings: Settings) -> float:
    """Return the longest time that a cycle which judges plans may take [s]."""
    return settings.synthesis_budget_s or PLANNING_TIME * settings.cycle_budget_s


def ways_of(profiles: Sequence[Profile]) -> tuple[str, tuple[Way, ...]]:
    """Return the model that the profiles run, and the ways in which they do. Raises BriefError."""
    found = [_NAME.fullmatch(profile.name) for profile in profiles]
    models = {match["model"] for match in found if match}
    if None in found or len(models) != 1:
        told = ", ".join(profile.name for profile in profiles)
        raise BriefError(
            f"Plans are made for one model on known GPUs, but the profiles are {told}; name profiles like "
            "h100-llama-3-8b-tp1-bf16."
        )
    ways = tuple(
        Way(match["gpu"], int(match["width"]), profile)
        for match, profile in zip(found, profiles, strict=True)
        if match
    )
    return models.pop(), ways


def cut_with_capacity(
    trace: Trace,
    capacity: CapacityTrace,
    profiles: Sequence[Profile],
    gpus: int,
    window_s: float,
    durations: Durations | None = None,
    at_most: int = 12,
) -> tuple[tuple[Trace, ...], tuple[Trace, ...], tuple[Yard, ...]]:
    """Return windows to race on, hold-out windows, and the yard of each, in that order.

    The capacity trace's largest count stands for `gpus` of each type of GPU that the profiles name. Every third window
    is held out, never the newest. `durations` is what changes of replicas take, where that is known.
    Raises BriefError where there are too few requests.
    """
    model, ways = ways_of(profiles)
    pieces, raced = long_windows(trace, window_s, at_most)
    known = asdict(durations) if durations else {}
    span_s = WINDOWS_EACH * window_s
    yards = tuple(
        replace(_yard(model, ways, capacity, gpus, from_s, span_s, window_s), **known)
        for from_s, _ in pieces
    )
    traces = tuple(piece for _, piece in pieces)
    return traces[:raced], traces[raced:], yards


def long_windows(
    trace: Trace, window_s: float, at_most: int
) -> tuple[list[tuple[float, Trace]], int]:
    """Cut a trace into windows in which plans have time to pay off, each `WINDOWS_EACH` of the planner's.

    Returns each with its start [s], those to race on before those held out, and how many are raced. Every third is
    held out, never the newest; of more than `at_most` the newest are taken. Raises BriefError where there are too few.
    """
    span_s = WINDOWS_EACH * window_s
    starts = np.arange(0.0, max(trace.duration_s - span_s / 2.0, 1e-9), span_s)
    pieces = [(start, trace.slice(start, start + span_s)) for start in starts.tolist()]
    pieces = [(at_s, p) for at_s, p in pieces if len(p) and p.arrival_s[-1] >= window_s][-at_most:]
    held = [
        i for i in range(len(pieces)) if (len(pieces) - 1 - i) % HOLDOUT_EVERY == HOLDOUT_EVERY - 1
    ]
    order = [*(i for i in range(len(pieces)) if i not in held), *held]
    if len(order) - len(held) < 2 or not held:
        raise BriefError(
            f"The traffic fills {len(pieces)} of the windows of {span_s:g} s, and a cycle that judges plans needs 4; "
            "use more traffic, or shorter windows."
        )
    named = [(pieces[i][0], replace(pieces[i][1], name=f"{trace.name}[{i}]")) for i in order]
    return named, len(order) - len(held)


def _yard(
    model: str,
    ways: tuple[Way, ...],
    capacity: CapacityTrace,
    gpus: int,
    from_s: float,
    span_s: float,
    window_s: float,
) -> Yard:
    narrowest = min(way.tensor_parallel for way in ways)
    counts = capacity.replicas(gpus, at_least=narrowest)
    at = int(np.searchsorted(capacity.at_s, from_s, "right")) - 1
    rows = [at, *(i for i in range(at + 1, len(counts)) if capacity.at_s[i] < from_s + span_s)]
    times: list[float] = []
    there: list[int] = []
    for i in rows:
        at_s, count = max(float(capacity.at_s[i]) - from_s, 0.0), int(counts[i])
        if times and times[-1] == at_s:
            there[-1] = count
        elif not there or there[-1] != count:
            times.append(at_s)
            there.append(count)
    courses = tuple(
        GpuCourse(name, tuple(times), tuple(there)) for name in dict.fromkeys(w.gpu for w in ways)
    )
    return Yard(model, ways, courses, everything(ways, courses, model), window_s)


def paired(fast: Sequence[Arm], slow: Sequence[Arm]) -> tuple[Incumbent, ...]:
    """Return incumbents with both: the first fast arm under every slow one, the others under the first slow one."""
    pairs = [(fast[0], each) for each in slow] + [(each, slow[0]) for each in fast[1:]]
    return tuple(
        Incumbent(
            arm_id(text_id(f.source), text_id(s.slow)),
            f.source,
            f.origin,
            f"{f.name} + {s.name}",
            s.slow,
        )
        for f, s in pairs
    )
