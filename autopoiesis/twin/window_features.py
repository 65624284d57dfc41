"""What slow functions see of a window, from what became of its requests: the same live and in the twin.

A live window's requests are an `Outcome` too (`recorded.observed`), and each replica's reports are those
that it makes of itself, or that the twin's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.objective import Objective
from autopoiesis.arms.slow_features import DemandFeatures, WindowFeatures
from autopoiesis.twin.outcome import LOST, Outcome, Status

Floats = NDArray[np.float64]

HOPELESS = 1e3
"""Utilisation of a fleet that cannot serve anything."""
HISTORY = 60
"""Windows whose arrival rates are told."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What is known of a window beside its requests."""

    reports: Sequence[Floats]
    """Per sample (replicas, 3): running, waiting and KV use [0..1], as the replicas that are there report them."""
    capacity_rps: float
    """What the plan is predicted to serve within the objectives [requests/s]."""
    preemptions: int = 0
    drifted: bool = False
    regret: float = 0.0
    windows_since_rescheduling: int = 0
    seconds_since_rescheduling: float = 0.0


def window_features(
    outcome: Outcome,
    span_s: tuple[float, float],
    objective: Objective,
    models: Sequence[str],
    beside: Beside,
    before: WindowFeatures | None = None,
) -> WindowFeatures:
    """Describe the window [from, to) as it stands at its end; `before` is the window before it.

    All the traffic is for each of the `models`: a fleet that has several serves them under one name.
    Prompt tokens and output tokens count when their request is finished. Later events in `outcome` are not
    looked at.
    """
    from_s, to_s = span_s
    seconds = to_s - from_s
    o = outcome.select(outcome.arrival_s < to_s)
    came = o.arrival_s >= from_s
    ended = (o.status == Status.COMPLETED) & (o.finished_s < to_s)
    finished = o.select(ended & (o.finished_s >= from_s))
    mine = o.select(came)
    mine_ended, mine_lost = ended[came], np.isin(mine.status, LOST) & (mine.finished_s < to_s)
    shed = mine.status == Status.SHED
    seen = mine.select(mine.first_token_s < to_s)
    done = mine.select(mine_ended)
    rate = len(mine.arrival_s) / seconds
    inputs, outputs = _mean(mine.input_tokens), _mean(finished.output_tokens)
    utility = objective.utility(done.ttft_s, done.tpot_s)
    decided = int(np.count_nonzero(mine_ended | mine_lost | shed))
    rates = before.arrival_rates_rps if before else ()
    reports = [sample for sample in beside.reports if len(sample)]
    kv = [sample[:, 2] for sample in reports]
    return WindowFeatures(
        seconds=seconds,
        requests=len(mine.arrival_s),
        completed=len(done.arrival_s),
        shed=int(np.count_nonzero(shed)),
        failed=int(np.count_nonzero(mine_lost)),
        unfinished=int(np.count_nonzero(_waits(o, to_s) | _runs(o, to_s))),
        arrival_rate_rps=rate,
        arrival_rate_change=_ratio(rate, before.arrival_rate_rps if before else 0.0),
        arrival_rates_rps=(*rates, rate)[-HISTORY:],
        arrival_burstiness=_variation(np.diff(mine.arrival_s)),
        input_tokens_mean=inputs,
        input_tokens_p99=_percentile(mine.input_tokens, 99),
        input_tokens_change=_ratio(inputs, before.input_tokens_mean if before else 0.0),
        output_tokens_mean=outputs,
        output_tokens_p99=_percentile(finished.output_tokens, 99),
        output_tokens_change=_ratio(outputs, before.output_tokens_mean if before else 0.0),
        prefix_share=_share(finished.cached_tokens.sum(), finished.input_tokens.sum()),
        ttft_p50_s=_percentile(seen.ttft_s, 50),
        ttft_p99_s=_percentile(seen.ttft_s, 99),
        tpot_p50_s=_percentile(done.tpot_s, 50),
        tpot_p99_s=_percentile(done.tpot_s, 99),
        e2e_mean_s=_mean(done.e2e_s),
        goodput_rps=float(np.count_nonzero(objective.met(done.ttft_s, done.tpot_s))) / seconds,
        utility=_share(utility.sum(), decided),
        throughput_tokens_s=float((finished.input_tokens + finished.output_tokens).sum()) / seconds,
        utilisation=_utilisation(rate, beside.capacity_rps),
        in_flight_mean=_overlap(o.dispatched_s, o.finished_s, span_s) / seconds,
        waiting_mean=_mean(np.array([sample[:, 1].sum() for sample in reports])),
        held_mean=_overlap(o.arrival_s, _left(o), span_s) / seconds,
        kv_usage_mean=_mean(np.array([sample.mean() for sample in kv])),
        kv_usage_max=max((float(sample.max()) for sample in kv), default=0.0),
        preemptions=beside.preemptions,
        drifted=beside.drifted,
        regret=beside.regret,
        windows_since_rescheduling=beside.windows_since_rescheduling,
        seconds_since_rescheduling=beside.seconds_since_rescheduling,
        slo_ttft_s=objective.slo_ttft_s,
        slo_tpot_s=objective.slo_tpot_s,
        demand=tuple(DemandFeatures(model, rate, inputs, outputs) for model in models),
    )


def _utilisation(rate_rps: float, capacity_rps: float) -> float:
    if capacity_rps <= 0.0:
        return HOPELESS if rate_rps > 0.0 else 0.0
    return min(rate_rps / capacity_rps, HOPELESS)


def _left(o: Outcome) -> Floats:
    """Return when each request left the gateway; one that was shed, or whose client went, at once; NaN: it waits."""
    gone = np.isnan(o.dispatched_s) & (o.status != Status.PENDING)
    return np.where(gone, o.arrival_s, o.dispatched_s)


def _waits(o: Outcome, at_s: float) -> NDArray[np.bool_]:
    return ~(_left(o) < at_s)


def _runs(o: Outcome, at_s: float) -> NDArray[np.bool_]:
    return (o.dispatched_s < at_s) & ~(o.finished_s < at_s)


def _overlap(start_s: Floats, end_s: Floats, span_s: tuple[float, float]) -> float:
    return float(overlaps_s(start_s, end_s, span_s).sum())


def overlaps_s(start_s: Floats, end_s: Floats, span_s: tuple[float, float]) -> Floats:
    """Return how long each interval lies within the span [s]; an end of NaN has not come."""
    from_s, to_s = span_s
    ends = np.where(np.isnan(end_s), to_s, end_s)
    return np.nan_to_num(np.minimum(ends, to_s) - np.maximum(start_s, from_s)).clip(0.0)


def _mean(values: NDArray[np.integer] | Floats) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _percentile(values: NDArray[np.integer] | Floats, percent: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percent)) if len(known) else 0.0


def _variation(gaps_s: Floats) -> float:
    mean = float(gaps_s.mean()) if len(gaps_s) > 1 else 0.0
    return float(gaps_s.std()) / mean if mean > 0.0 else 1.0


def _ratio(now: float, before: float) -> float:
    return now / before if before > 0.0 else 1.0


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0
