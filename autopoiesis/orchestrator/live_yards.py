"""What plans could have been made of in the windows that telemetry has: a live fleet's past as yards for synthesis.

A replica was there in a window if it had traffic in it, or if a plan or an operator had it stopped, put to sleep or
restarted then: its GPUs could have been used. One that was neither was lost.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from autopoiesis.arms.plan import Kind
from autopoiesis.orchestrator.capacity import kinds_of, plan_from_kinds, typical
from autopoiesis.orchestrator.plan_features import Durations
from autopoiesis.orchestrator.yards import WINDOWS_EACH, long_windows
from autopoiesis.synthesis.brief import BriefError
from autopoiesis.telemetry.query import QueryResult
from autopoiesis.twin.latency import Profile, StepModel, at_speed
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.yard import GpuCourse, Way, Yard, everything

Ask = Callable[[str], QueryResult]

_SERVED = """
    select w.started_s, w.ended_s, list_distinct(flatten(list(a.replicas)))
    from windows w join allocations a using (window_id)
    where w.ended_s > {since_s!r} group by all order by w.started_s"""
_CHANGED = """
    select replica, action, began_s - drain_s, began_s + seconds from reconfigurations
    where error = '' and began_s < {until_s!r} order by began_s desc limit 1000"""
GOES = frozenset({"stop", "sleep"})
"""Changes after which a replica is away until it is started again."""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A window as it was."""

    started_s: float
    ended_s: float
    served: frozenset[str]
    """Replicas that had traffic."""


@dataclass(frozen=True, slots=True)
class Past:
    """The fleet's past windows, oldest first, and when replicas were away because somebody wanted it so."""

    stretches: tuple[Stretch, ...]
    spared: Mapping[str, Sequence[Span]]

    def there(self, stretch: Stretch, name: str) -> bool:
        """Tell whether a replica's GPUs could be used in a stretch."""
        at_s = (stretch.started_s + stretch.ended_s) / 2.0
        spared = any(from_s <= at_s < to_s for from_s, to_s in self.spared.get(name, ()))
        return spared or name in stretch.served


def past_of(ask: Ask, since_s: float, until_s: float) -> Past:
    """Read what telemetry has of the fleet's windows since a time (Unix time [s]).

    Raises:
        QueryError, TelemetryError: it cannot be read.
    """
    served = ask(_SERVED.format(since_s=since_s)).rows
    stretches = tuple(Stretch(float(a), float(b), frozenset(names)) for a, b, names in served)
    spared: dict[str, list[Span]] = {}
    for name, action, from_s, to_s in reversed(ask(_CHANGED.format(until_s=until_s)).rows):
        spans = spared.setdefault(name, [])
        is_away = bool(spans) and spans[-1][1] == math.inf
        if is_away and action not in GOES:
            spans[-1] = spans[-1][0], float(to_s)
        elif not is_away:
            spans.append((float(from_s), math.inf if action in GOES else float(to_s)))
    return Past(stretches, spared)


def cut_with_past(
    trace: Trace,
    past: Past,
    fleet: Sequence[ReplicaSpec],
    window_s: float,
    durations: Durations,
    max_changes: int,
    at_most: int = 8,
) -> tuple[tuple[Trace, ...], tuple[Trace, ...], tuple[Yard, ...]]:
    """Return windows to race on, hold-out windows, and the yard of each, in that order.

    `trace` has Unix times, `fleet` every replica that is or was there. Changes take `durations`; a plan that changes
    more than `max_changes` replicas is refused, as it would be live. Raises BriefError where too little is known.
    """
    if not past.stretches:
        raise BriefError("Nothing is stored yet of which replicas served in which window.")
    began_s = max(past.stretches[0].started_s, float(trace.arrival_s[0]))
    known = trace.slice(began_s, math.inf)
    pieces, raced = long_windows(known, window_s, at_most)
    yards = tuple(
        _yard(past, fleet, began_s + from_s, window_s, durations, max_changes)
        for from_s, _ in pieces
    )
    traces = tuple(piece for _, piece in pieces)
    return traces[:raced], traces[raced:], yards


def _yard(
    past: Past,
    fleet: Sequence[ReplicaSpec],
    from_s: float,
    window_s: float,
    durations: Durations,
    max_changes: int,
) -> Yard:
    until_s = from_s + WINDOWS_EACH * window_s
    kinds = kinds_of(fleet)
    before = [s for s in past.stretches if s.started_s <= from_s][-1:]
    during = [*before, *(s for s in past.stretches if from_s < s.started_s < until_s)]
    counts = [
        _gpus(kind for kind, spec in zip(kinds, fleet, strict=True) if past.there(s, spec.name))
        for s in during
    ]
    times = [max(s.started_s - from_s, 0.0) for s in during]
    times[:1] = [0.0]
    courses = tuple(
        _course(gpu, times, [count[gpu] for count in counts])
        for gpu in dict.fromkeys(kind.gpu for kind in kinds)
        if any(count[gpu] for count in counts)
    )
    ways = {
        (kind.gpu, kind.tensor_parallel): Way(kind.gpu, kind.tensor_parallel, _at_its_speed(spec))
        for kind, spec in reversed(typical(fleet, kinds).items())
        if any(count[kind.gpu] for count in counts)
    }
    if not courses:
        raise BriefError("In a stored window there was no replica whose profile is known.")
    first = plan_from_kinds(
        Counter(
            kind for kind, spec in zip(kinds, fleet, strict=True) if spec.name in during[0].served
        )
    )
    return Yard(
        kinds[0].model,
        tuple(ways.values()),
        courses,
        first if first.groups else everything(tuple(ways.values()), courses, kinds[0].model),
        window_s,
        max_changes=max_changes,
        **asdict(durations),
    )


def _gpus(kinds: Iterable[Kind]) -> Counter[str]:
    """Count GPUs by type."""
    count = Counter[str]()
    for kind in kinds:
        count[kind.gpu] += kind.tensor_parallel
    return count


def _course(gpu: str, times: Sequence[float], counts: Sequence[int]) -> GpuCourse:
    """Return the course of a type of GPU, each change once."""
    changes = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]]
    return GpuCourse(gpu, tuple(times[i] for i in changes), tuple(counts[i] for i in changes))


def _at_its_speed(spec: ReplicaSpec) -> Profile:
    step = StepModel.from_array(at_speed(spec.profile.step, spec.speed))
    return replace(spec.profile, step=step)
