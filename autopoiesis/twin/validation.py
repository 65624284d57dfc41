"""How far the twin is from what replicas really did, on requests that it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopoiesis.twin.calibration import replay
from autopoiesis.twin.latency import Profile
from autopoiesis.twin.recorded import Recorded
from autopoiesis.twin.split import Choice, everything

Floats = NDArray[np.float64]

STATISTICS = ("mean", "p50", "p90", "p99")
MEASURES = ("ttft_s", "tpot_s", "e2e_s")
RESAMPLES = 500
CONFIDENCE = 0.9
BLOCKS = 20
"""Blocks of time that are drawn in a bootstrap: requests near each other are not independent."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure as observed and as the twin has it; errors are relative to what was observed."""

    measure: str
    statistic: str
    observed: float
    twin: float
    error: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The twin against what was recorded."""

    profile: str
    requests: int
    from_s: float
    """When the first of the compared requests was sent."""
    comparisons: tuple[Comparison, ...]
    median_error: dict[str, float]
    """Measure → median of the requests' absolute relative errors."""
    observed: dict[str, Floats]
    """Measure → the values of each request, NaN where not defined."""
    twin: dict[str, Floats]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "profile": self.profile,
            "requests": self.requests,
            "from_s": self.from_s,
            "median_error": self.median_error,
            "errors": [
                {name: getattr(c, name) for name in Comparison.__slots__} for c in self.comparisons
            ],
        }


def validate(
    recordings: Sequence[Recorded],
    profile: Profile,
    compared: Choice = everything,
    speeds: dict[str, float] | None = None,
    seed: int = 0,
) -> Validation:
    """Replay all requests and compare those of them that are `compared`.

    Raises:
        ValueError: none of these was completed.
    """
    speeds = speeds or {}
    observed: dict[str, list[Floats]] = {m: [] for m in MEASURES}
    twin: dict[str, list[Floats]] = {m: [] for m in MEASURES}
    sent: list[Floats] = []
    for r in recordings:
        chosen = compared(r.trace.arrival_s)
        simulated = replay(r, profile, speeds.get(r.replica, 1.0))
        for measure, values in zip(MEASURES, simulated, strict=True):
            observed[measure].append(getattr(r, measure)[chosen])
            twin[measure].append(values[chosen])
        sent.append(r.trace.arrival_s[chosen])
    seen = {m: np.concatenate(v) for m, v in observed.items()}
    made = {m: np.concatenate(v) for m, v in twin.items()}
    sent_s = np.concatenate(sent)
    if not np.isfinite(seen["e2e_s"]).any():
        raise ValueError("no request was completed in the part to validate on; record more")
    blocks = _blocks(sent_s)
    rng = np.random.default_rng(seed)
    comparisons = [
        _compared(m, s, seen[m], made[m], blocks, rng) for m in MEASURES for s in STATISTICS
    ]
    tokens = np.concatenate(
        [r.trace.output_tokens[compared(r.trace.arrival_s)] for r in recordings]
    )
    comparisons += _throughput(sent_s, seen["e2e_s"], made["e2e_s"], tokens.astype(np.float64))
    return Validation(
        profile=profile.name,
        requests=len(sent_s),
        from_s=float(sent_s.min()),
        comparisons=tuple(comparisons),
        median_error={m: _median_error(seen[m], made[m]) for m in MEASURES},
        observed=seen,
        twin=made,
    )


def _compared(
    measure: str,
    statistic: str,
    observed: Floats,
    twin: Floats,
    blocks: list[NDArray[np.int64]],
    rng: np.random.Generator,
) -> Comparison:
    def error(rows: NDArray[np.int64] | slice) -> float:
        seen = _statistic(statistic, observed[rows])  # 0 where all tokens come in one piece
        return _statistic(statistic, twin[rows]) / seen - 1.0 if seen else float("nan")

    draws = [
        error(np.concatenate([blocks[b] for b in rng.integers(0, len(blocks), len(blocks))]))
        for _ in range(RESAMPLES)
    ]
    known = [draw for draw in draws if np.isfinite(draw)] or [float("nan")]
    low, high = np.percentile(known, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    everything = slice(None)
    return Comparison(
        measure,
        statistic,
        _statistic(statistic, observed),
        _statistic(statistic, twin),
        error(everything),
        float(low),
        float(high),
    )


def _median_error(observed: Floats, twin: Floats) -> float:
    there = np.isfinite(observed) & np.isfinite(twin) & (observed > 0.0)
    return float(np.median(np.abs(twin[there] / observed[there] - 1.0))) if there.any() else np.nan


def _statistic(name: str, values: Floats) -> float:
    there = values[np.isfinite(values)]
    if not len(there):
        return float("nan")
    return float(there.mean() if name == "mean" else np.percentile(there, float(name[1:])))


def _throughput(
    sent_s: Floats, observed_s: Floats, twin_s: Floats, tokens: Floats
) -> list[Comparison]:
    """Compare the rates at which requests and tokens come out while requests still come in."""
    began_s, ended_s = float(sent_s.min()), float(sent_s.max())
    span_s = max(ended_s - began_s, 1e-9)
    rows: list[Comparison] = []
    for measure, weight in (("requests_rps", np.ones_like(tokens)), ("tokens_s", tokens)):
        rates = [
            float(weight[np.isfinite(e2e) & (sent_s + e2e <= ended_s)].sum()) / span_s
            for e2e in (observed_s, twin_s)
        ]
        error = rates[1] / rates[0] - 1.0 if rates[0] else float("nan")
        rows.append(Comparison(measure, "mean", rates[0], rates[1], error, error, error))
    return rows


def _blocks(sent_s: Floats) -> list[NDArray[np.int64]]:
    edges = np.linspace(sent_s.min(), np.nextafter(sent_s.max(), np.inf), BLOCKS + 1)
    which = np.digitize(sent_s, edges) - 1
    return [rows for b in range(BLOCKS) if len(rows := np.flatnonzero(which == b))]


def plot(validation: Validation, path: Path) -> None:
    """Draw observed against simulated quantiles, one panel a measure, as SVG or PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only for those who plot

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    labels = ("time to first token [s]", "time per token [s]", "whole time [s]")
    for ax, measure, label in zip(axes, MEASURES, labels, strict=True):
        q = np.linspace(0.5, 99.5, 100)
        x = np.nanpercentile(validation.observed[measure], q)
        y = np.nanpercentile(validation.twin[measure], q)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        ax.plot(ends, ends, color="0.6", linewidth=1)
        ax.plot(x, y, ".", color="#1f6f8b", markersize=4)
        for percentile in (50, 90, 99):
            at = np.abs(q - percentile).argmin()
            ax.annotate(
                f"p{percentile}",
                (x[at], y[at]),
                fontsize=8,
                xytext=(4, -9),
                textcoords="offset points",
            )
        ax.set(xscale="log", yscale="log", xlabel=f"observed {label}", ylabel="twin")
        ax.grid(alpha=0.3)
    figure.suptitle(
        f"{validation.requests} requests not fitted to, {validation.profile}", fontsize=10
    )
    figure.savefig(path)
