"""The context of a window: what its traffic and its fleet were like, as a vector for the bandit.

Every number describes the window before the one that is decided, so none is a consequence of the
arm that is being chosen. Skewed ones are logarithms.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autopoiesis.orchestrator.reward import Judged
from autopoiesis.twin.simulation import ReplicaSpec

Floats = NDArray[np.float64]

NAMES = (
    "bias",
    "log_rate_rps",
    "log_burstiness",
    "log_input_tokens_mean",
    "log_input_tokens_p90",
    "log_output_tokens_mean",
    "prefix_share",
    "kv_usage",
    "log_replicas",
    "hour_sin",
    "hour_cos",
)
FEATURES = len(NAMES)
VERSION = 1
"""Of the names and of the scaler's arrays; another version starts afresh."""
PRIOR_SD = np.array([1.0, 0.5, 0.3, 0.5, 0.5, 0.5, 0.2, 0.2, 0.5, 0.7, 0.7])
"""Standard deviation of each number over a day, as far as it is known before one is seen."""
PRIOR_WINDOWS = 20.0
"""Windows that the prior standard deviation counts for."""
FROZEN_AFTER_WINDOWS = 8640
"""A day of 10 s windows; from then on the scale stands, so that old beliefs keep their meaning."""
CLIP = 3.0
"""Standardised numbers are kept within this many standard deviations."""


def context_of(
    arrival_s: Floats,
    input_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    cached_tokens: NDArray[np.int64],
    started_s: float,
    duration_s: float,
    kv_usage: float,
    replicas: int,
) -> dict[str, float]:
    """Describe a window by its requests; the keys are `NAMES`. An empty window has rate 0.

    `output_tokens` holds those of finished requests only, so it may be shorter. Unix seconds.
    """
    gaps = np.diff(arrival_s)
    mean_gap = float(gaps.mean()) if len(gaps) else 0.0
    burstiness = float(gaps.std()) / mean_gap if mean_gap > 0.0 and len(gaps) > 1 else 1.0
    total_input = float(input_tokens.sum())
    hour = 2.0 * math.pi * (started_s % 86400.0) / 86400.0
    values = (
        1.0,
        math.log1p(len(arrival_s) / duration_s),
        math.log(max(burstiness, 0.05)),
        math.log1p(float(input_tokens.mean()) if len(input_tokens) else 0.0),
        math.log1p(float(np.percentile(input_tokens, 90)) if len(input_tokens) else 0.0),
        math.log1p(float(output_tokens.mean()) if len(output_tokens) else 0.0),
        float(cached_tokens.sum()) / total_input if total_input > 0.0 else 0.0,
        min(max(kv_usage, 0.0), 1.0),
        math.log1p(replicas),
        math.sin(hour),
        math.cos(hour),
    )
    return dict(zip(NAMES, values, strict=True))


class Scaler:
    """Online standardisation (Welford, 1962) with a prior on the spread; the bias stays 1."""

    def __init__(self) -> None:
        self._count = 0.0
        self._mean = np.zeros(FEATURES)
        self._squares = PRIOR_WINDOWS * PRIOR_SD**2

    def update(self, context: Mapping[str, float]) -> None:
        """Take one more window into account; an empty one, or one after the freeze, is not."""
        if self._count >= FROZEN_AFTER_WINDOWS or context["log_rate_rps"] <= 0.0:
            return
        x = np.array([context[name] for name in NAMES])
        self._count += 1.0
        before = x - self._mean
        self._mean += before / self._count
        self._squares += before * (x - self._mean)

    def standardise(self, context: Mapping[str, float] | None) -> Floats:
        """Return the vector that the bandit sees, (FEATURES,); without context the average one."""
        vector = np.zeros(FEATURES)
        if context is not None and self._count > 0.0 and context["log_rate_rps"] > 0.0:
            x = np.array([context[name] for name in NAMES])
            sd = np.sqrt(self._squares / (PRIOR_WINDOWS + self._count))
            vector = np.clip((x - self._mean) / sd, -CLIP, CLIP)
        vector[0] = 1.0
        return vector

    def to_arrays(self) -> dict[str, Floats]:
        """Return the state as named arrays."""
        return {
            "version": np.array([VERSION, self._count]),
            "mean": self._mean.copy(),
            "squares": self._squares.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Scaler":
        """Read what `to_arrays` gave; ValueError if it was another version."""
        version, count = np.asarray(arrays["version"], np.float64)
        if int(version) != VERSION:
            raise ValueError(f"scaler state has version {version:g}, this program reads {VERSION}")
        scaler = cls()
        scaler._count = float(count)
        scaler._mean = np.array(arrays["mean"], np.float64)
        scaler._squares = np.array(arrays["squares"], np.float64)
        return scaler


def describe(judged: Judged, replicas: Sequence[ReplicaSpec]) -> dict[str, float]:
    """Describe a window by the requests that arrived in it, as far as they have come."""
    o = judged.outcome
    finished = ~np.isnan(o.finished_s)
    # Token-seconds held by the window's own requests over what the fleet could hold: the same
    # number live and in the twin, whatever a replica reports of itself.
    until_s = np.where(finished, np.minimum(o.finished_s, judged.ended_s), judged.ended_s)
    held_s = np.nan_to_num(np.maximum(until_s - o.dispatched_s, 0.0))
    capacity = sum(r.profile.kv_tokens for r in replicas) * judged.duration_s
    held = float((held_s * (o.input_tokens + np.where(finished, o.output_tokens, 0))).sum())
    return context_of(
        o.arrival_s,
        o.input_tokens,
        o.output_tokens[finished],
        o.cached_tokens,
        judged.started_s,
        judged.duration_s,
        held / capacity if capacity > 0.0 else 0.0,
        len(replicas),
    )
