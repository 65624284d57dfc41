"""Futures that were not seen: traffic that was, varied. Requests keep their order and number."""

from dataclasses import replace

import numpy as np

from autopoiesis.twin.trace import Trace

LENGTH_SPREAD = 0.2
GAP_SPREAD = 0.5


def perturbed(
    trace: Trace,
    rng: np.random.Generator,
    *,
    rate: float = 1.0,
    length: float = LENGTH_SPREAD,
    burst: float = GAP_SPREAD,
) -> Trace:
    """Return the trace with other lengths and other gaps of the same kind.

    Each request's lengths are multiplied by a log-normal factor of median 1, and each time between
    arrivals by another; then the whole is stretched to last 1/`rate` of what it lasted. Prompts
    change only beyond their hashed blocks, so what they share stays shared. With gaps of a
    coefficient of variation c the new one is about sqrt((1 + c^2) * exp(burst^2) - 1).

    Args:
        trace: What was seen.
        rng: Where the factors come from.
        rate: How many times as fast requests arrive.
        length: Standard deviation of the logarithm of a length's factor; 0 keeps lengths.
        burst: The same of a gap's factor; 0 keeps the arrivals' pattern.

    Raises:
        ValueError: `rate` is not above 0, or a spread is negative.
    """
    if not (rate > 0.0 and np.isfinite(rate)):
        raise ValueError(f"rate must be above 0, got {rate}")
    for name, spread in (("length", length), ("burst", burst)):
        if not (spread >= 0.0 and np.isfinite(spread)):
            raise ValueError(f"{name} must be at least 0, got {spread}")
    n = len(trace)
    whole_blocks = np.maximum(np.diff(trace.block_start) - 1, 0)
    least = np.minimum(whole_blocks * trace.block_tokens + 1, trace.input_tokens)
    inputs = np.rint(trace.input_tokens * rng.lognormal(0.0, length, n))
    outputs = np.rint(trace.output_tokens * rng.lognormal(0.0, length, n))
    gaps = np.diff(trace.arrival_s, prepend=0.0) * rng.lognormal(0.0, burst, n)
    arrival_s = np.cumsum(gaps)
    if n and arrival_s[-1] > 0.0:
        arrival_s *= trace.duration_s / rate / arrival_s[-1]
    most = np.maximum(trace.max_output_tokens, trace.output_tokens)
    return replace(
        trace,
        arrival_s=arrival_s,
        input_tokens=np.maximum(inputs, least).astype(np.int64),
        output_tokens=np.clip(outputs, 1, most).astype(np.int64),
    )
