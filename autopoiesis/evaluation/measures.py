"""What is measured of a contestant: one row of figures, and one line per window."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.evaluation.contestants import Ran
from autopoiesis.evaluation.scenario import Situation
from autopoiesis.orchestrator.reward import met, percentile, utilities
from autopoiesis.twin.outcome import LOST, Status

Floats = NDArray[np.float64]

ADAPTED_WINDOWS = 2
"""Windows in a row that must be as good as the best human arm's for a contestant to have adapted."""
ADAPTED_WITHIN = 0.05
"""Share of requests within the objectives by which it may still be behind."""


class Windows(NamedTuple):
    """The judged windows, one entry each."""

    started_s: Floats
    requests: Floats
    met: Floats
    """Requests completed within both objectives."""
    utility: Floats
    """Sum over the window's requests."""

    def as_lists(self) -> dict[str, list[float]]:
        """Return it for JSON."""
        return {name: column.tolist() for name, column in self._asdict().items()}


def measured(situation: Situation, ran: Ran) -> tuple[dict[str, Any], Windows]:
    """Return the figures of a run over the requests that arrive in the judged part, and its windows.

    Times are seconds; shed and failed requests count as misses and have utility 0.
    """
    objective, outcome = situation.objective, ran.served.outcome
    judged = outcome.select(outcome.arrival_s >= situation.judged_from_s)
    utility, _ = utilities(judged, objective, np.inf)
    within = met(judged, objective)
    n = len(utility)
    duration_s = situation.trace.duration_s - situation.judged_from_s
    e2e_s = judged.e2e_s[~np.isnan(judged.e2e_s)]
    row: dict[str, Any] = {
        "requests": n,
        "misses": int(n - within.sum()),
        "miss_share": float(1.0 - within.mean()) if n else 0.0,
        "goodput_rps": float(within.sum()) / max(duration_s, 1e-9),
        "utility": float(utility.mean()) if n else 0.0,
        "completed": int((judged.status == Status.COMPLETED).sum()),
        "shed": int((judged.status == Status.SHED).sum()),
        "failed": int(np.isin(judged.status, LOST).sum()),
        "ttft_p50_s": percentile(judged.ttft_s, 50),
        "ttft_p99_s": percentile(judged.ttft_s, 99),
        "tpot_p50_s": percentile(judged.tpot_s, 50),
        "tpot_p99_s": percentile(judged.tpot_s, 99),
        "e2e_mean_s": float(e2e_s.mean()) if len(e2e_s) else None,
        "e2e_p99_s": percentile(judged.e2e_s, 99),
        "throughput_tokens_s": float(judged.output_tokens[judged.status == Status.COMPLETED].sum())
        / max(duration_s, 1e-9),
        "replica_seconds": ran.served.replica_seconds,
        "promoted": ran.promoted,
        "harmful": ran.harmful,
        "live": ran.live,
        "harmful_live": ran.harmful_live,
        "evolution_cpu_s": ran.spent.cpu_s,
        "evolution_replays": ran.spent.replays,
        "evolution_cycles": ran.spent.cycles,
        "evolution_tokens": ran.spent.tokens,
        "evolution_usd": ran.spent.cost_usd,
    }
    since_s = judged.arrival_s - situation.judged_from_s
    window = (since_s // situation.window_s).astype(np.int64)
    count = int(window.max(initial=-1)) + 1

    def summed(weights: NDArray[Any]) -> Floats:
        return np.bincount(window, weights.astype(np.float64), minlength=count).astype(np.float64)

    windows = Windows(
        started_s=np.arange(count, dtype=np.float64) * float(situation.window_s),
        requests=summed(np.ones(n)),
        met=summed(within),
        utility=summed(utility),
    )
    return row, windows


def adaptation_s(ours: Windows, best: Floats, shift_s: float, window_s: float) -> float | None:
    """Return the time from a shift until windows are as good as the best human arm's there.

    `best` is the share of requests within the objectives under the human arm that is best in that
    window in hindsight, (n,). Times count from the beginning of the judged part. None: never, or the
    traffic ends before it can be said.
    """
    share = ours.met / np.maximum(ours.requests, 1.0)
    good = share >= best - ADAPTED_WITHIN
    first = int(shift_s // window_s)
    for i in range(first, len(good) - ADAPTED_WINDOWS + 1):
        if good[i : i + ADAPTED_WINDOWS].all():
            return max(float(ours.started_s[i]) - shift_s, 0.0)
    return None
