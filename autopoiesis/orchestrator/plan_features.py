"""What slow functions are told: the window that has just ended, and the fleet with what it could be."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    OptionFeatures,
    WindowFeatures,
)
from autopoiesis.orchestrator.capacity import Slot, Standing
from autopoiesis.orchestrator.reward import Judged, met
from autopoiesis.twin.latency import at_speed, step_s
from autopoiesis.twin.outcome import LOST, Status
from autopoiesis.twin.simulation import ReplicaSpec

RATES = 60
"""Arrival rates that slow functions see."""
HOPELESS = 1e3
"""Utilisation of a fleet that cannot serve anything."""
STABLE_S = 600.0
"""What a plan has to pay off in, while nobody knows how long the traffic stays as it is."""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long changes take on this fleet [s]: measured where any was, else assumed."""

    start_s: float = 60.0
    drain_s: float = 20.0
    stop_s: float = 1.0


@dataclass(slots=True)
class History:
    """What the features of a window need of those before it."""

    rates_rps: deque[float] = field(default_factory=lambda: deque[float]((), RATES))
    input_tokens_mean: float = 0.0
    output_tokens_mean: float = 0.0
    available: dict[str, int] = field(default_factory=dict[str, int])
    windows_since: int = 0
    """Windows since the plan was changed."""
    changed_s: float | None = None
    """When it was carried out."""


def window_features(
    judged: Judged,
    objective: Objective,
    history: History,
    slots: Sequence[Slot],
    *,
    drifted: bool,
    regret: float,
) -> WindowFeatures:
    """Describe a window that has just ended, and note in `history` what the next one needs of it."""
    o, n = judged.outcome, len(judged.utility)
    seconds = judged.duration_s
    completed = o.status == Status.COMPLETED
    inputs = o.input_tokens.astype(np.float64)
    outputs = o.output_tokens[completed].astype(np.float64)
    rate = n / seconds
    input_mean, output_mean = _mean(inputs), _mean(outputs)
    rates = [*history.rates_rps, rate][-RATES:]
    gaps = np.diff(o.arrival_s)
    busy_s = np.nan_to_num(np.where(completed, o.finished_s, judged.ended_s) - o.dispatched_s)
    held_s = np.where(np.isnan(o.dispatched_s), judged.ended_s, o.dispatched_s) - o.arrival_s
    there = [slot for slot in slots if slot.standing is Standing.READY]
    held_tokens = float((busy_s.clip(0.0) * (o.input_tokens + o.output_tokens)).sum()) / seconds
    kv = held_tokens / max(sum(s.spec.profile.kv_tokens for s in there), 1)
    capacity = sum(capacity_rps(s.spec, input_mean, output_mean, objective) for s in there)
    before = history.rates_rps[-1] if history.rates_rps else 0.0
    models = sorted({slot.kind.model for slot in slots})
    features = WindowFeatures(
        seconds=seconds,
        requests=n,
        completed=int(completed.sum()),
        shed=int((o.status == Status.SHED).sum()),
        failed=int(np.isin(o.status, LOST).sum()),
        unfinished=int((o.status == Status.PENDING).sum()),
        arrival_rate_rps=rate,
        arrival_rate_change=_change(rate, before),
        arrival_rates_rps=tuple(rates),
        arrival_burstiness=float(gaps.std() / gaps.mean())
        if len(gaps) and gaps.mean() > 0
        else 1.0,
        input_tokens_mean=input_mean,
        input_tokens_p99=_percentile(inputs, 99),
        input_tokens_change=_change(input_mean, history.input_tokens_mean),
        output_tokens_mean=output_mean,
        output_tokens_p99=_percentile(outputs, 99),
        output_tokens_change=_change(output_mean, history.output_tokens_mean),
        prefix_share=float(o.cached_tokens.sum() / max(inputs.sum(), 1.0)),
        ttft_p50_s=_percentile(o.ttft_s, 50),
        ttft_p99_s=_percentile(o.ttft_s, 99),
        tpot_p50_s=_percentile(o.tpot_s, 50),
        tpot_p99_s=_percentile(o.tpot_s, 99),
        e2e_mean_s=_mean(o.e2e_s),
        goodput_rps=float(met(o, objective).sum()) / seconds,
        utility=judged.mean_utility() or 0.0,
        throughput_tokens_s=float(inputs[completed].sum() + outputs.sum()) / seconds,
        utilisation=min(rate / capacity, HOPELESS) if capacity > 0.0 else HOPELESS * (rate > 0.0),
        in_flight_mean=float(busy_s.clip(0.0).sum()) / seconds,
        waiting_mean=0.0,
        held_mean=float(held_s.clip(0.0).sum()) / seconds,
        kv_usage_mean=min(kv, 1.0),
        kv_usage_max=min(kv, 1.0),
        preemptions=0,
        drifted=drifted,
        regret=regret,
        windows_since_rescheduling=history.windows_since,
        seconds_since_rescheduling=judged.ended_s - (history.changed_s or judged.started_s),
        slo_ttft_s=objective.slo_ttft_s,
        slo_tpot_s=objective.slo_tpot_s,
        demand=tuple(DemandFeatures(m, rate, input_mean, output_mean) for m in models),
    )
    history.rates_rps.append(rate)
    history.input_tokens_mean = input_mean or history.input_tokens_mean
    history.output_tokens_mean = output_mean or history.output_tokens_mean
    return features


def fleet_features(
    slots: Sequence[Slot],
    window: WindowFeatures,
    history: History,
    durations: Durations,
    minimum_replicas: int,
) -> FleetFeatures:
    """Describe what the fleet has and could be: its places are the GPUs that there are."""
    total, available = Counter[str](), Counter[str]()
    kinds: dict[Kind, ReplicaSpec] = {}
    for slot in slots:
        total[slot.kind.gpu] += slot.kind.tensor_parallel
        if slot.standing is not Standing.LOST:
            available[slot.kind.gpu] += slot.kind.tensor_parallel
        kinds.setdefault(slot.kind, slot.spec)
    reference = next(iter(kinds.values()))
    objective = Objective(window.slo_ttft_s, window.slo_tpot_s)
    lengths = window.input_tokens_mean, window.output_tokens_mean
    gpus = [
        GpuFeatures(
            name=gpu,
            total=total[gpu],
            available=available[gpu],
            available_before=history.available.get(gpu, available[gpu]),
            leaving=0,
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
            load_s=durations.start_s,
            engine_s=0.0,
            warmup_s=0.0,
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


def _mean(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else 0.0


def _percentile(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", q: float) -> float:
    there = values[~np.isnan(values)]
    return float(np.percentile(there, q)) if len(there) else 0.0


def _change(now: float, before: float) -> float:
    return now / before if before > 0.0 else 1.0
