"""What slow functions are told: the window that has just ended, and the fleet with what it could be."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.objective import Objective
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    OptionFeatures,
    WindowFeatures,
)
from autopoiesis.orchestrator.capacity import Slot, Standing, typical
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.telemetry.records import Reconfiguration
from autopoiesis.twin.latency import at_speed, step_s
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.window_features import Beside, overlaps_s, window_features

STABLE_S = 600.0
"""What a plan has to pay off in, while nobody knows how long the traffic stays as it is."""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long changes take on this fleet [s]: measured where any was, else assumed."""

    load_s: float = 60.0
    """The model's weights; of a fleet that tells no phases, the whole start."""
    engine_s: float = 0.0
    """Processes, imports, compiling, capturing graphs, the KV cache."""
    warmup_s: float = 0.0
    """What the first answer takes longer than the next ones."""
    drain_s: float = 20.0
    stop_s: float = 1.0

    @property
    def start_s(self) -> float:
        """The whole start. That its cache is cold then is no duration: the twin starts it with an empty one."""
        return self.load_s + self.engine_s + self.warmup_s

    def learned(self, change: Reconfiguration) -> "Durations":
        """Return these, with what one change has taken."""
        if change.error:
            return self
        drain_s = change.drain_s or self.drain_s
        if change.action in {"stop", "sleep"}:
            return replace(self, drain_s=drain_s, stop_s=change.seconds)
        engine_s = change.import_s + change.compile_s + change.capture_s + change.engine_s
        return replace(
            self,
            load_s=change.load_s,
            engine_s=engine_s,
            warmup_s=change.warmup_s,
            drain_s=drain_s,
        )


@dataclass(slots=True)
class History:
    """What the features of a window need of those before it."""

    before: WindowFeatures | None = None
    """The window that was described last."""
    available: dict[str, int] = field(default_factory=dict[str, int])
    windows_since: int = 0
    """Windows since the plan was changed."""
    changed_s: float | None = None
    """When it was carried out."""


def describe(
    seen: Observation,
    objective: Objective,
    history: History,
    slots: Sequence[Slot],
    *,
    drifted: bool,
    regret: float,
) -> WindowFeatures:
    """Describe a window that has just ended as the twin does, and note in `history` what the next one needs.

    Replicas' own reports are not kept: their KV use is estimated from what they held, and of what waits in
    their queues or was preempted nothing is told.
    """
    span_s = seen.started_s, seen.ended_s
    o = seen.outcome
    there = [slot.spec for slot in slots if slot.standing is Standing.READY]
    busy_s = overlaps_s(o.dispatched_s, o.finished_s, span_s)
    seconds = seen.ended_s - seen.started_s
    held_tokens = float((busy_s * (o.input_tokens + o.output_tokens)).sum()) / seconds
    kv = min(held_tokens / max(sum(spec.profile.kv_tokens for spec in there), 1), 1.0)
    mine = o.select((o.arrival_s >= seen.started_s) & (o.arrival_s < seen.ended_s))
    lengths = _mean(mine.input_tokens), _mean(mine.output_tokens[mine.status == Status.COMPLETED])
    features = window_features(
        o,
        span_s,
        objective,
        sorted({slot.kind.model for slot in slots}),
        Beside(
            reports=[np.array([[busy_s.sum() / seconds, 0.0, kv]])],
            capacity_rps=sum(capacity_rps(spec, *lengths, objective) for spec in there),
            drifted=drifted,
            regret=regret,
            windows_since_rescheduling=history.windows_since,
            seconds_since_rescheduling=seen.ended_s - (history.changed_s or seen.started_s),
        ),
        history.before,
    )
    history.before = features
    return features


def features_to_plain(features: WindowFeatures | None) -> dict[str, Any] | None:
    """Return a window's features as JSON has them; None where there are none."""
    if features is None:
        return None
    return features._asdict() | {"demand": [list(demand) for demand in features.demand]}


def features_from_plain(plain: Mapping[str, Any] | None) -> WindowFeatures | None:
    """Read what `features_to_plain` gave."""
    if plain is None:
        return None
    read: dict[str, Any] = dict(plain)
    read["demand"] = tuple(DemandFeatures(*each) for each in plain["demand"])
    read["arrival_rates_rps"] = tuple(plain["arrival_rates_rps"])
    return WindowFeatures(**read)


def fleet_features(
    slots: Sequence[Slot],
    window: WindowFeatures,
    history: History,
    durations: Durations,
    minimum_replicas: int,
) -> FleetFeatures:
    """Describe what the fleet has and could be: its places are the GPUs that there are."""
    total, available, leaving = Counter[str](), Counter[str](), Counter[str]()
    kinds = typical([slot.spec for slot in slots], [slot.kind for slot in slots])
    for slot in slots:
        total[slot.kind.gpu] += slot.kind.tensor_parallel
        if slot.standing is not Standing.LOST:
            available[slot.kind.gpu] += slot.kind.tensor_parallel
            leaving[slot.kind.gpu] += slot.kind.tensor_parallel * slot.leaving
    reference = next(iter(kinds.values()))
    objective = Objective(window.slo_ttft_s, window.slo_tpot_s)
    lengths = window.input_tokens_mean, window.output_tokens_mean
    gpus = [
        GpuFeatures(
            name=gpu,
            total=total[gpu],
            available=available[gpu],
            available_before=history.available.get(gpu, available[gpu]),
            leaving=leaving[gpu],
            arriving=0,
            per_node=max(kind.tensor_parallel for kind in kinds if kind.gpu == gpu),
            price_usd_h=0.0,
            memory_gib=0.0,
            speed=_speed(next(s for k, s in kinds.items() if k.gpu == gpu), reference),
        )
        for gpu in total
    ]
    history.available = dict(available)
    options = {
        (kind.model, kind.gpu, kind.tensor_parallel): OptionFeatures(
            model=kind.model,
            gpu=kind.gpu,
            tensor_parallel=kind.tensor_parallel,
            capacity_rps=capacity_rps(spec, *lengths, objective),
            capacity_tokens_s=capacity_rps(spec, *lengths, objective) * sum(lengths),
            memory_gib=0.0,
            kv_tokens=spec.profile.kv_tokens,
            load_s=durations.load_s,
            engine_s=durations.engine_s,
            warmup_s=durations.warmup_s,
        )
        for kind, spec in kinds.items()
    }
    return FleetFeatures(
        gpus=tuple(gpus),
        nodes=(),
        models=tuple(
            ModelFeatures(model, 0.0, minimum_replicas)
            for model in sorted({kind.model for kind in kinds})
        ),
        options=tuple(options.values()),
        drain_s=durations.drain_s,
        stop_s=durations.stop_s,
        stable_s=STABLE_S,
        starting=sum(slot.standing is Standing.STARTING for slot in slots),
        lost=sum(slot.standing is Standing.LOST for slot in slots),
    )


def capacity_rps(
    spec: ReplicaSpec, input_tokens: float, output_tokens: float, objective: Objective
) -> float:
    """Return roughly what one replica serves within the objectives at these mean lengths [requests/s].

    As many sequences decode at once as fit the KV cache and the objective per token; each of their
    steps computes the part of a prompt that keeps pace. Without lengths: of a usual request.
    """
    prompt, answer = (input_tokens or 1000.0), (output_tokens or 200.0)
    profile = spec.profile
    coefficients = at_speed(profile.step, spec.speed)
    context = prompt + answer / 2.0
    most = int(min(profile.max_num_seqs, max(profile.kv_tokens / (prompt + answer), 1.0)))
    best = 0.0
    for batch in {1, most} | {2**k for k in range(1, 11) if 2**k < most}:
        chunk = min(prompt * batch / answer, float(profile.max_num_batched_tokens - batch))
        chunk = max(chunk, 1.0)
        took_s = float(
            step_s(
                coefficients,
                int(batch + chunk),
                batch + 1,
                batch + 1,
                batch,
                int(batch * context),
                int(chunk),
                chunk * prompt / 2.0,
                0,
            )
        )
        if took_s <= objective.slo_tpot_s or batch == 1:
            best = max(best, min(batch / answer, chunk / prompt) / took_s)
    return best


def _speed(spec: ReplicaSpec, reference: ReplicaSpec) -> float:
    objective = Objective(math.inf, math.inf)
    return capacity_rps(spec, 0.0, 0.0, objective) / capacity_rps(reference, 0.0, 0.0, objective)


def _mean(values: NDArray[np.integer]) -> float:
    return float(values.mean()) if len(values) else 0.0
