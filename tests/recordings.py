"""Recordings made by the twin itself under a hidden profile, with the noise of a real machine."""

from dataclasses import replace

import numpy as np

from autopoiesis.twin.calibration import GROUPS, replay
from autopoiesis.twin.latency import ClientOverhead, Profile, profile
from autopoiesis.twin.recorded import Recorded
from autopoiesis.twin.trace import Trace

H100 = profile("h100-llama-3-8b-tp1-bf16")
SLOWER = {
    **dict.fromkeys(GROUPS["step"], 1.7),
    **dict.fromkeys(GROUPS["token"], 1.2),
    **dict.fromkeys(GROUPS["sequence"], 2.5),
    **dict.fromkeys(GROUPS["context"], 1.5),
    **dict.fromkeys(GROUPS["pairs"], 1.2),
}


def loads(rates_rps: list[float], seconds: float, seed: int) -> Trace:
    """Poisson arrivals at one rate after another, with chat-like lengths and no shared prefixes."""
    rng = np.random.default_rng(seed)
    gaps = [rng.exponential(1 / rate, round(rate * seconds)) for rate in rates_rps]
    arrival_s = np.cumsum(np.concatenate(gaps))
    n = len(arrival_s)
    return Trace(
        arrival_s=arrival_s,
        input_tokens=np.clip(rng.lognormal(6.5, 0.8, n).astype(np.int64), 8, 6000),
        output_tokens=np.clip(rng.lognormal(4.8, 0.7, n).astype(np.int64), 2, 800),
        max_output_tokens=np.full(n, 4096),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.empty(0, np.int64),
        block_tokens=256,
        name="loads",
    )


def hidden(factors: dict[str, float], http_s: float = 0.004) -> Profile:
    """Return an H100 whose coefficients are other than believed, by these factors."""
    step = replace(H100.step, **{n: getattr(H100.step, n) * f for n, f in factors.items()})
    client = ClientOverhead(request_s=http_s, end_s=0.0, token_s=0.0)
    return replace(H100, step=step, client=client)


def record(
    truth: Profile,
    trace: Trace,
    seed: int,
    noise: float = 0.05,
    name: str = "r0",
    speed: float = 1.0,
) -> Recorded:
    """Return what a replica of that true profile would have been seen to do."""
    rng = np.random.default_rng(seed)
    nowhere = np.full(len(trace), np.nan)
    ttft_s, tpot_s, _ = replay(Recorded(name, trace, nowhere, nowhere, nowhere), truth, speed)
    factor = rng.lognormal(0.0, noise, len(trace))
    slow = np.where(rng.random(len(trace)) < 0.01, 5.0, 1.0)
    ttft_s, tpot_s = ttft_s * factor * slow, tpot_s * factor
    return Recorded(name, trace, ttft_s, tpot_s, ttft_s + tpot_s * (trace.output_tokens - 1))
