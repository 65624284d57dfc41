"""Small seeded fleets and traces for the orchestrator's tests."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import arm_from_source
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.composition import splice
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

SHED_ALL = """
def score(request, replica, fleet):
    return replica.in_flight

def admit(request, fleet):
    return 0
"""
LEAST_REQUESTS_BUT_ELSEWHERE = """
def score(request, replica, fleet):
    return 2 * replica.in_flight + 1
"""


SHORT_ONLY = """
def score(request, replica, fleet):
    return replica.in_flight

def admit(request, fleet):
    return 1200 - request.input_tokens
"""
LONG_ONLY = SHORT_ONLY.replace("1200 - request.input_tokens", "request.input_tokens - 1200")


class MemoryStore:
    def __init__(self, arms: Sequence[Arm] = ()) -> None:
        self.arms = {arm.id: arm for arm in arms}

    def load_arms(self) -> list[Arm]:
        return list(self.arms.values())

    def save_arm(self, arm: Arm) -> None:
        self.arms[arm.id] = arm


def human(*names: str) -> tuple[Arm, ...]:
    return tuple(a for a in seed_arms() if a.name in names)


def written(source: str, name: str, state: State = State.CANARY) -> Arm:
    return arm_from_source(source, name=name, origin=Origin.GENETIC, state=state, created_at=1.0)


def person_s(source: str, name: str) -> Arm:
    return arm_from_source(source, name=name, origin=Origin.HUMAN, state=State.LIVE, created_at=1.0)


def registry(*arms: Arm) -> Registry:
    return Registry(MemoryStore(arms))


def fleet(n: int, name: str = "a100-llama-3-8b-tp1-bf16") -> tuple[ReplicaSpec, ...]:
    return tuple(ReplicaSpec(f"r{i}", profile(name)) for i in range(n))


def poisson(
    seed: int, rate_rps: float, duration_s: float, input_tokens: int, output_tokens: int
) -> Trace:
    """Poisson arrivals with log-normal lengths around these means, a session each."""
    rng = np.random.default_rng(seed)
    n = int(rng.poisson(rate_rps * duration_s))
    inputs, outputs = (
        np.maximum(rng.lognormal(np.log(mean) - 0.32, 0.8, n), 1).astype(np.int64)
        for mean in (input_tokens, output_tokens)
    )
    return Trace(
        arrival_s=np.sort(rng.uniform(0, duration_s, n)),
        input_tokens=inputs,
        output_tokens=outputs,
        max_output_tokens=np.full(n, 8192),
        session=rng.integers(1, 1 << 62, n),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=16,
        name=f"poisson-{seed}",
    )


def steady(seed: int, rate_rps: float, duration_s: float, input_tokens: int) -> Trace:
    """Poisson arrivals of requests that are all alike."""
    trace = poisson(seed, rate_rps, duration_s, input_tokens, 60)
    return replace(trace, input_tokens=np.full(len(trace), input_tokens))


def shifting(seed: int) -> Trace:
    """Light chat traffic, then long prompts under load, for 50 s each."""
    first, second = poisson(seed, 20, 50, 300, 100), poisson(seed + 1, 14, 50, 2500, 150)
    return splice((first, second), "shifting")
