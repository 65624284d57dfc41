"""Fleets, traffic and policies that the synthesis tests share."""

from dataclasses import replace

import numpy as np

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.synthesis.brief import Brief, Incumbent, cut
from autopoiesis.synthesis.proposer import Account, Proposal
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

ROUND_ROBIN = """
def score(request, replica, fleet):
    return (replica.position - fleet.sequence) % fleet.replicas
"""
RANDOM = """
def score(request, replica, fleet):
    return (replica.position * 0.618 + fleet.draw) % 1.0
"""

BY_SPEED = """# less work for slow replicas
def score(request, replica, fleet):
    return replica.in_flight / replica.speed
"""


def poisson(rate_rps: float, duration_s: float, seed: int, name: str = "poisson") -> Trace:
    rng = np.random.default_rng(seed)
    n = int(rate_rps * duration_s)
    return Trace(
        arrival_s=np.sort(rng.uniform(0.0, duration_s, n)),
        input_tokens=rng.lognormal(6.2, 0.8, n).astype(np.int64) + 1,
        output_tokens=rng.lognormal(4.0, 0.6, n).astype(np.int64) + 1,
        max_output_tokens=np.full(n, 1024),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=256,
        name=name,
    )


def incumbent(name: str, source: str) -> Incumbent:
    policy = verify(source)
    return Incumbent(policy.id, policy.source, Origin.HUMAN, name)


def uneven_fleet() -> tuple[ReplicaSpec, ...]:
    """Two fast replicas and two slow ones."""
    kind = profile("h100-llama-3-8b-tp1-bf16")
    return tuple(
        ReplicaSpec(f"r{i}", kind, speed) for i, speed in enumerate((1.0, 1.0, 0.25, 0.25))
    )


def uneven_brief() -> Brief:
    """Traffic that round robin serves badly because half of the replicas are slow."""
    windows, holdout = cut(poisson(60.0, 30.0, 7), window_s=3.0, warmup_s=1.0)
    return Brief(
        trigger="regret above 0.05 for 3 windows",
        objective=Objective(slo_ttft_s=0.3, slo_tpot_s=0.03),
        replicas=uneven_fleet(),
        windows=windows,
        holdout=holdout,
        incumbents=(incumbent("round-robin", ROUND_ROBIN), incumbent("random", RANDOM)),
        seed=1,
        budget_s=60.0,
        max_candidates=48,
        warmup_s=1.0,
        asked_s=1.0,
    )


def idle_brief() -> Brief:
    """So little traffic that every policy serves it perfectly."""
    windows, holdout = cut(poisson(2.0, 40.0, 8), window_s=5.0)
    return replace(
        uneven_brief(),
        objective=Objective(slo_ttft_s=5.0, slo_tpot_s=0.5),
        windows=windows,
        holdout=holdout,
        warmup_s=0.0,
    )


def hopeless_brief() -> Brief:
    """An objective that one idle replica cannot meet, whatever the policy."""
    return replace(
        idle_brief(),
        objective=Objective(slo_ttft_s=0.01, slo_tpot_s=0.5),
        replicas=uneven_fleet()[:1],
        max_candidates=24,
    )


class Scripted:
    """A proposer that says what it is told, and notes what it is shown."""

    origin = Origin.FILES
    account = Account()

    def __init__(self, *batches: list[str]) -> None:
        self.batches = list(batches)
        self.briefs, self.parents, self.learnt = [], [], []

    def propose(self, brief, parents, n, rng):
        self.briefs.append(brief)
        self.parents.append(list(parents))
        batch = self.batches.pop(0) if self.batches else []
        spent = self.account
        self.account = Account(spent.tokens + 7 * len(batch), spent.cost_usd + 0.5 * len(batch))
        return [Proposal(source, self.origin, thought="told so") for source in batch]

    def learn(self, verdicts):
        self.learnt = list(verdicts)
