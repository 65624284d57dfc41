"""The workloads of the Autopoiesis paper (arXiv 2604.07144v1, appendix H.3), made anew from a seed.

The paper publishes, per phase, the number of requests and their mean prefill and decode lengths.
It does not publish how lengths spread, when requests arrive within a phase, or how many requests the
SpotServe traces have: those are arguments here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.twin.capacity_trace import CapacityTrace
from autopoiesis.twin.trace import DEFAULT_MAX_OUTPUT_TOKENS, Trace

HETEROGENEOUS = 1.8
"""How many times as many requests a phase has in the paper's heterogeneous cluster (HexGen)."""
SPOT_REQUESTS = 600
"""Requests in a phase of a SpotServe trace; ours."""
LENGTH_SPREAD = 0.3
"""Standard deviation of the logarithm of lengths; ours."""


class Phase(NamedTuple):
    """One phase: a number of requests around a mean shape."""

    name: str
    requests: int
    prefill_tokens: float
    decode_tokens: float


def _phases(requests: int, *shapes: tuple[str, float, float]) -> tuple[Phase, ...]:
    return tuple(Phase(name, requests, prefill, decode) for name, prefill, decode in shapes)


PAPER_TRACES: dict[str, tuple[Phase, ...]] = {
    "sharegpt": _phases(
        5120,
        ("prefill-heavy", 1231.9, 14.0),
        ("decode-heavy", 535.2, 545.4),
        ("balanced-short", 549.0, 17.5),
        ("stable-mixed", 1093.9, 290.3),
        ("stable-mixed", 1100.6, 292.4),
        ("stable-mixed", 1096.8, 288.5),
    ),
    "longbench": _phases(
        1728,
        ("prefill-heavy", 2035.2, 4.8),
        ("prefill-heavy", 2036.8, 3.2),
        ("decode-heavy", 1596.6, 372.6),
        ("stable-decode-heavy", 1604.8, 373.1),
        ("stable-decode-heavy", 1553.7, 396.7),
        ("stable-decode-heavy", 1582.4, 386.8),
    ),
    "spotserve-1": _phases(
        SPOT_REQUESTS,
        ("decode-heavy", 512, 1024),
        ("mixed", 2048, 256),
        ("prefill-heavy", 4096, 128),
        ("mixed-stable", 2048, 256),
    ),
    "spotserve-2": _phases(
        SPOT_REQUESTS,
        ("prefill-heavy", 4096, 128),
        ("mixed", 2048, 256),
        ("decode-heavy", 512, 1024),
        ("mixed-stable", 2048, 256),
    ),
}
"""Tables 14 and 15; the counts are those of the homogeneous cluster (DistServe)."""

SPOT_PHASE_S = 30.0
"""Four phases share the 120 s of the cluster's schedule."""
SPOT_BUCKET_S = 3.0
SPOT_GPUS = (
    24, 25, 26, 27, 29, 30, 32, 33, 36, 38, 42, 45, 48, 51, 54, 55, 60, 60, 63, 62,
    64, 61, 62, 60, 60, 57, 56, 54, 54, 55, 53, 51, 50, 49, 49, 47, 45, 45, 44, 43,
)  # fmt: skip
"""Table 16: GPUs of the elastic cluster in each bucket of 3 s."""


def phased(
    phases: Sequence[Phase],
    seed: int,
    *,
    phase_s: float,
    arrive_s: float | None = None,
    scale: float = 1.0,
    spread: float = LENGTH_SPREAD,
    name: str = "phases",
) -> Trace:
    """Return one request stream that goes through the phases, `phase_s` after each other.

    Lengths are log-normal around the phase's means, each on its own, rounded so that means hold.
    All clients have the same output limit. There are no sessions and no shared prefixes.

    Args:
        phases: What to go through.
        seed: Of lengths and arrivals.
        phase_s: From the beginning of a phase to that of the next.
        arrive_s: A phase's requests arrive at random in the first so many seconds of it: 0 is one
            batch at its beginning, as in the paper; None is all of `phase_s`.
        scale: How many times as many requests; `HETEROGENEOUS` for the paper's second cluster.
        spread: Standard deviation of the logarithm of lengths.
        name: Of the trace.

    Raises:
        ValueError: no phase, or a time, `scale` or `spread` that cannot be.
    """
    over_s = phase_s if arrive_s is None else arrive_s
    if not phases:
        raise ValueError("a trace needs at least one phase")
    if not (0.0 < phase_s < np.inf and 0.0 <= over_s <= phase_s):
        raise ValueError(
            f"phase_s must be above 0 and arrive_s within it, got {phase_s} and {arrive_s}"
        )
    if not (0.0 < scale < np.inf and 0.0 <= spread < np.inf):
        raise ValueError(f"scale must be above 0 and spread at least 0, got {scale} and {spread}")
    rng = np.random.default_rng(seed)
    counts = [max(round(phase.requests * scale), 1) for phase in phases]
    starts_s = [i * phase_s + np.sort(rng.random(n)) * over_s for i, n in enumerate(counts)]
    inputs, outputs = (
        np.concatenate([_lengths(rng, m, spread, n) for m, n in zip(means, counts, strict=True)])
        for means in ([p.prefill_tokens for p in phases], [p.decode_tokens for p in phases])
    )
    total = sum(counts)
    return Trace(
        arrival_s=np.concatenate(starts_s),
        input_tokens=inputs,
        output_tokens=outputs,
        max_output_tokens=np.full(total, max(DEFAULT_MAX_OUTPUT_TOKENS, int(outputs.max()))),
        session=np.zeros(total, np.int64),
        priority=np.zeros(total),
        block_start=np.zeros(total + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=BLOCK_TOKENS,
        name=name,
    )


def paper_trace(name: str, seed: int, *, phase_s: float, scale: float = 1.0) -> Trace:
    """Return one of `PAPER_TRACES`, each phase a batch at its beginning; SpotServe's spread out.

    A ValueError for an unknown name lists them.
    """
    if name not in PAPER_TRACES:
        raise ValueError(f"the paper has no trace {name!r}; it has {', '.join(PAPER_TRACES)}")
    batch = None if name.startswith("spotserve") else 0.0
    return phased(PAPER_TRACES[name], seed, phase_s=phase_s, arrive_s=batch, scale=scale, name=name)


def paper_capacity() -> CapacityTrace:
    """Return the size of the paper's elastic cluster over its 120 s (table 16)."""
    return CapacityTrace(
        SPOT_BUCKET_S * np.arange(len(SPOT_GPUS), dtype=np.float64),
        np.array(SPOT_GPUS),
        "spotserve",
    )


def _lengths(rng: np.random.Generator, mean: float, spread: float, n: int) -> NDArray[np.int64]:
    """Draw lengths of this mean, at least 1, rounded up or down by chance."""
    exact = mean * rng.lognormal(-spread * spread / 2, spread, n)
    return np.maximum(np.floor(exact + rng.random(n)), 1).astype(np.int64)
