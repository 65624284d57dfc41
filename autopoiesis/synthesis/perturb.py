"""Futures that were not seen: the recent traffic, varied. Requests keep their order and number."""

from dataclasses import replace

import numpy as np

from autopoiesis.twin.trace import Trace

LENGTH_SIGMA = 0.2
"""Spread of the factor on each request's lengths (standard deviation of its logarithm)."""
GAP_SIGMA = 0.5
"""Spread of the factor on each time between arrivals."""


def varied(trace: Trace, rng: np.random.Generator) -> Trace:
    """Return the trace with other lengths and other gaps of the same kind, and the same duration.

    Prompts change only beyond their hashed blocks, so what they share stays shared.
    """
    n = len(trace)
    hashed = np.maximum((np.diff(trace.block_start) - 1) * trace.block_tokens + 1, 1)
    inputs = np.maximum(np.rint(trace.input_tokens * rng.lognormal(0.0, LENGTH_SIGMA, n)), hashed)
    outputs = np.rint(trace.output_tokens * rng.lognormal(0.0, LENGTH_SIGMA, n))
    gaps = np.diff(trace.arrival_s, prepend=0.0) * rng.lognormal(0.0, GAP_SIGMA, n)
    arrival_s = np.cumsum(gaps)
    if n and arrival_s[-1] > 0.0:
        arrival_s *= trace.duration_s / arrival_s[-1]
    return replace(
        trace,
        arrival_s=arrival_s,
        input_tokens=inputs.astype(np.int64),
        output_tokens=np.clip(outputs, 1, np.maximum(trace.max_output_tokens, 1)).astype(np.int64),
    )
