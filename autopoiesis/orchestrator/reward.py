"""What came of a window: utility per request, per cell, and the rows that telemetry keeps.

The same code judges the live fleet and the twin. A request belongs to the cell whose shard it
arrived for. Requests still running when the window settles count once their first token is out or late, as
if they went on at the pace they have: an arm can neither hide its backlog nor is it punished for
long answers. Those that wait within the objective are censored.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS, Allocation
from autopoiesis.arms.objective import Objective
from autopoiesis.telemetry.records import CellRow, WindowRow
from autopoiesis.twin.outcome import LOST, Outcome, Status

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

BURN_IN = 0.3
"""Share of a window that is dropped at its head in cells whose replicas have changed their arm."""


def utilities(
    outcome: Outcome, objective: Objective, now_s: float, pace_s: Floats | None = None
) -> tuple[Floats, Mask]:
    """Return each request's utility as known at `now_s`, and whether it counts yet.

    `pace_s`, (n,), is the time per token of those that still run, NaN where unknown.

    A completed request without a first token's time was not streamed: its whole time is held
    against the time that the objective allows for an answer of its length.
    """
    utility = objective.utility(outcome.ttft_s, outcome.tpot_s)
    whole = (outcome.status == Status.COMPLETED) & np.isnan(outcome.first_token_s)
    in_all = np.minimum(1.0, _allowed_s(outcome, objective) / outcome.e2e_s)
    utility[whole] = objective.graded(in_all[whole])
    utility[np.isin(outcome.status, (Status.SHED, *LOST))] = 0.0
    pending = outcome.status == Status.PENDING
    answered = ~np.isnan(outcome.first_token_s)
    waited_s = np.where(answered, outcome.ttft_s, now_s - outcome.arrival_s)
    told = pending & (answered | (waited_s > objective.slo_ttft_s))
    pace_s = np.full(len(utility), np.nan) if pace_s is None else pace_s
    utility[told] = objective.utility(waited_s[told], pace_s[told])
    return utility, ~pending | told


def paces(outcome: Outcome, since_s: float, now_s: float) -> Floats:
    """Return the time per token after the first of requests that still run at `now_s`, (n,); NaN where unknown.

    Where nobody has counted a stream's tokens it is that of its replica's answers that ended after `since_s`,
    or of the whole fleet's where there is none.
    """
    o = outcome
    took_s, tokens = o.finished_s - o.first_token_s, o.output_tokens - 1
    told = (o.finished_s >= since_s) & (tokens > 0) & ~np.isnan(took_s)
    columns = o.replica[told] + 1, int(o.replica.max(initial=-1)) + 2
    spent_s = np.bincount(columns[0], took_s[told], columns[1])
    came = np.bincount(columns[0], tokens[told], columns[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        everywhere = spent_s.sum() / came.sum()
        usual = np.where(came > 0, spent_s / came, everywhere)[o.replica + 1]
        own = (now_s - o.first_token_s) / (o.generated_tokens - 1)
    return np.where(o.generated_tokens > 1, own, usual)


def met(outcome: Outcome, objective: Objective) -> Mask:
    """Tell which requests were completed within both objectives (goodput counts these)."""
    whole = np.isnan(outcome.first_token_s) & (outcome.e2e_s <= _allowed_s(outcome, objective))
    in_time = objective.met(outcome.ttft_s, outcome.tpot_s) | whole
    return (outcome.status == Status.COMPLETED) & in_time


def _allowed_s(outcome: Outcome, objective: Objective) -> Floats:
    later_tokens = np.maximum(outcome.output_tokens - 1, 0)
    return objective.slo_ttft_s + later_tokens * objective.slo_tpot_s


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The requests of one window, judged."""

    started_s: float
    ended_s: float
    outcome: Outcome
    utility: Floats
    counts: Mask
    """Whether the request's end is known and it did not arrive in its cell's burn-in."""
    met: Mask

    @property
    def duration_s(self) -> float:
        """Length of the window [s]."""
        return self.ended_s - self.started_s

    def mean_utility(self, where: Mask | None = None) -> float | None:
        """Return the mean utility of the requests that count, None if none does."""
        which = self.counts if where is None else self.counts & where
        return float(self.utility[which].mean()) if which.any() else None


def judge(
    outcome: Outcome,
    objective: Objective,
    started_s: float,
    ended_s: float,
    now_s: float,
    fresh_shards: Mask | None = None,
) -> Judged:
    """Judge the requests that arrived in [started_s, ended_s), as seen at `now_s`.

    `fresh_shards`, (SHARDS,), marks the shards whose cells drop their burn-in.
    """
    mine = (outcome.arrival_s >= started_s) & (outcome.arrival_s < ended_s)
    window = outcome.select(mine)
    pace_s = paces(outcome, now_s - (ended_s - started_s), now_s)
    utility, counts = utilities(window, objective, now_s, pace_s[mine])
    if fresh_shards is not None:
        head = window.arrival_s < started_s + BURN_IN * (ended_s - started_s)
        counts &= ~(head & fresh_shards[window.shard])
    return Judged(started_s, ended_s, window, utility, counts, met(window, objective))


def fresh_shards(allocation: Allocation, previous: Allocation | None) -> Mask:
    """Mark the shards of cells in which a replica serves another arm than before, (SHARDS,)."""
    before = {r: c.arm_id for c in previous.cells for r in c.replicas} if previous else {}
    fresh = np.zeros(SHARDS, np.bool_)
    for cell in allocation.cells:
        if any(before.get(r) != cell.arm_id for r in cell.replicas):
            fresh[list(cell.shards)] = True
    return fresh


def cell_rows(judged: Judged, allocation: Allocation) -> list[CellRow]:
    """Return one row per cell of the window."""
    cell_of = np.full(SHARDS, -1)
    for i, cell in enumerate(allocation.cells):
        cell_of[list(cell.shards)] = i
    owner = cell_of[judged.outcome.shard]
    rows: list[CellRow] = []
    for i, cell in enumerate(allocation.cells):
        mine = owner == i
        totals = _totals(judged, mine)
        rows.append(
            CellRow(
                window=allocation.window,
                cell=i,
                arm_id=cell.arm_id,
                replicas=cell.replicas,
                shards=len(cell.shards),
                propensity=cell.propensity,
                requests=totals.requests,
                completed=totals.completed,
                shed=totals.shed,
                failed=totals.failed,
                unfinished=totals.unfinished,
                input_tokens=int(judged.outcome.input_tokens[mine].sum()),
                output_tokens=totals.output_tokens,
                ttft_p50_s=totals.ttft_p50_s,
                ttft_p99_s=totals.ttft_p99_s,
                tpot_p50_s=totals.tpot_p50_s,
                goodput_rps=totals.goodput_rps,
                utility=judged.mean_utility(mine),
                replica_seconds=len(cell.replicas) * judged.duration_s,
            )
        )
    return rows


def window_row(
    judged: Judged,
    window: int,
    objective: Objective,
    context: Mapping[str, float],
    regret: tuple[float, float, float] | None,
    drift: Sequence[str],
    twin_weight: float,
) -> WindowRow:
    """Return the window's row; `regret` is its estimate with the ends of its interval."""
    totals = _totals(judged, np.ones(len(judged.utility), np.bool_))
    value, low, high = regret or (None, None, None)
    return WindowRow(
        window=window,
        started_s=judged.started_s,
        ended_s=judged.ended_s,
        objective=objective.as_dict(),
        context=dict(context),
        requests=totals.requests,
        completed=totals.completed,
        shed=totals.shed,
        failed=totals.failed,
        throughput_tokens_s=totals.output_tokens / judged.duration_s,
        ttft_p50_s=totals.ttft_p50_s,
        ttft_p99_s=totals.ttft_p99_s,
        tpot_p50_s=totals.tpot_p50_s,
        tpot_p99_s=totals.tpot_p99_s,
        goodput_rps=totals.goodput_rps,
        utility=judged.mean_utility(),
        regret=value,
        regret_low=low,
        regret_high=high,
        drift=",".join(drift),
        twin_weight=twin_weight,
    )


@dataclass(frozen=True, slots=True)
class _Totals:
    requests: int
    completed: int
    shed: int
    failed: int
    unfinished: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    goodput_rps: float


def _totals(judged: Judged, where: Mask) -> _Totals:
    o = judged.outcome
    status = o.status[where]
    completed = where & (o.status == Status.COMPLETED)
    return _Totals(
        requests=int(where.sum()),
        completed=int(completed.sum()),
        shed=int((status == Status.SHED).sum()),
        failed=int(np.isin(status, LOST).sum()),
        unfinished=int((status == Status.PENDING).sum()),
        output_tokens=int(o.output_tokens[completed].sum()),
        ttft_p50_s=percentile(o.ttft_s[where], 50),
        ttft_p99_s=percentile(o.ttft_s[where], 99),
        tpot_p50_s=percentile(o.tpot_s[where], 50),
        tpot_p99_s=percentile(o.tpot_s[where], 99),
        goodput_rps=float((judged.met & where).sum()) / judged.duration_s,
    )


def percentile(values: Floats, q: float) -> float | None:
    """Return the q-th percentile of the values that are there, None if none is."""
    there = values[~np.isnan(values)]
    return float(np.percentile(there, q)) if len(there) else None


def utility_by_arm(rows: Collection[CellRow]) -> dict[str, tuple[float, int]]:
    """Return each arm's mean utility over its cells, weighted by requests, and these requests."""
    by_arm: dict[str, tuple[float, int]] = {}
    for row in rows:
        if row.utility is not None:
            mean, n = by_arm.get(row.arm_id, (0.0, 0))
            total = n + row.requests
            by_arm[row.arm_id] = ((mean * n + row.utility * row.requests) / total, total)
    return by_arm


def shard_load(judged: Judged) -> Floats:
    """Return each shard's tokens in the window, in mean requests of the window, (SHARDS,)."""
    o = judged.outcome
    weights = (o.input_tokens + o.output_tokens).astype(np.float64)
    tokens = np.bincount(o.shard, weights=weights, minlength=SHARDS).astype(np.float64)
    return tokens / max(float(weights.mean()) if len(weights) else 0.0, 1.0)
