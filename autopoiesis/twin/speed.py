"""How fast the twin is: simulated requests per second of this process's CPU time.

A trace is replayed at 70 % of what the fleet can do, on 8 and on 64 replicas. The kernels are
compiled before the clock starts, and the best of a few repetitions counts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.features import Fleet, Replica, Request
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.twin.latency import Profile
from autopoiesis.twin.python_policy import PythonPolicy
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import DEFAULT_MAX_OUTPUT_TOKENS, Trace

POLICIES = ("least-requests", "prefix-affinity", "weighted-scorer")
"""What is measured unless other human arms are asked for."""
LOAD = 0.7
"""Share of the rate at which the replicas are saturated."""
FEW, MANY = 8, 64
"""Sizes of the fleet."""
REPETITIONS = 5
REQUESTS = 15_000
"""Length of the synthetic trace."""


class SpeedError(ValueError):
    """What was asked for cannot be measured."""


@dataclass(frozen=True, slots=True)
class PolicySpeed:
    """One policy's rates [simulated requests per CPU second]."""

    policy: str
    compiled_rps: float
    """Compiled, on 8 replicas."""
    compiled_64_rps: float
    """Compiled, on 64 replicas."""
    python_rps: float | None
    """As a plain Python function, on 8 replicas; None where nobody has written it as one."""

    @property
    def cost_ratio_64_to_8(self) -> float:
        """Return how many times the CPU time of a request grows from 8 replicas to 64."""
        return self.compiled_rps / self.compiled_64_rps


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """The rates of all measured policies; the headline figures are the worst of them."""

    trace: str
    requests: int
    profile: str
    load_rps_per_replica: float
    policies: tuple[PolicySpeed, ...]

    @property
    def compiled_rps(self) -> float:
        """Return the lowest rate of a compiled policy on 8 replicas."""
        return min(p.compiled_rps for p in self.policies)

    @property
    def python_rps(self) -> float | None:
        """Return the lowest rate of a policy in plain Python, None if there was none."""
        return min((p.python_rps for p in self.policies if p.python_rps is not None), default=None)

    @property
    def cost_ratio_64_to_8(self) -> float:
        """Return the highest ratio."""
        return max(p.cost_ratio_64_to_8 for p in self.policies)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "trace": self.trace,
            "requests": self.requests,
            "profile": self.profile,
            "load_rps_per_replica": self.load_rps_per_replica,
            "compiled_rps": self.compiled_rps,
            "python_rps": self.python_rps,
            "cost_ratio_64_to_8": self.cost_ratio_64_to_8,
            "policies": [
                asdict(p) | {"cost_ratio_64_to_8": p.cost_ratio_64_to_8} for p in self.policies
            ],
        }


def measure(
    trace: Trace,
    profile: Profile,
    policies: Sequence[str] = POLICIES,
    progress: Callable[[str], None] = lambda _line: None,
) -> SpeedReport:
    """Measure human arms by name.

    A SpeedError says which name there is not, or that all requests of the trace arrive at once.
    """
    if not trace.duration_s > 0.0:
        raise SpeedError(
            f"all requests of {trace.name} arrive at once, which is no load that lasts; take another"
        )
    sources = {arm.name: arm.source for arm in seed_arms()}
    for name in policies:
        if name not in sources:
            raise SpeedError(f"there is no human arm {name!r}; there are {', '.join(sources)}")
    programs = {name: compile_policy(verify(sources[name])) for name in policies}
    progress("compiling the kernels where that has not been done yet, for a minute or two")
    load_rps = LOAD * saturation_rps(trace, next(iter(programs.values())), profile)
    few, many = (at_rate(trace, load_rps * count) for count in (FEW, MANY))
    speeds: list[PolicySpeed] = []
    for name, program in programs.items():
        progress(f"measuring {name}")
        python = PYTHON.get(name)
        speeds.append(
            PolicySpeed(
                name,
                compiled_rps=simulated_rps(few, program, profile, FEW),
                compiled_64_rps=simulated_rps(many, program, profile, MANY),
                python_rps=None if python is None else simulated_rps(few, python, profile, FEW),
            )
        )
    return SpeedReport(trace.name, len(trace), profile.name, load_rps, tuple(speeds))


def simulated_rps(
    trace: Trace,
    program: Program | PythonPolicy,
    profile: Profile,
    replicas: int,
    *,
    jumps: bool = True,
    repetitions: int = REPETITIONS,
) -> float:
    """Return requests per CPU second, the best of a few repetitions."""
    best_s = math.inf
    for _ in range(repetitions):
        simulation = _fleet(trace, program, profile, replicas, jumps=jumps)
        simulation.advance(0.0)
        started_s = time.process_time()
        simulation.advance(math.inf)
        best_s = min(best_s, time.process_time() - started_s)
    return len(trace) / best_s


def saturation_rps(trace: Trace, program: Program, profile: Profile) -> float:
    """Return the rate at which one replica serves when everything arrives at once."""
    sample = trace.head(1000).speed(1e6)
    simulation = _fleet(sample, program, profile, 1)
    simulation.advance(math.inf)
    return len(sample) / float(np.nanmax(simulation.outcome().finished_s))


def at_rate(trace: Trace, rate_rps: float) -> Trace:
    """Speed the trace up or down to that many requests a second."""
    return trace.speed(rate_rps * trace.duration_s / len(trace))


def conversations(requests: int, seed: int, rate_rps: float = 6.0) -> Trace:
    """Make a trace where none is at hand: Poisson arrivals, lengths as in Azure's conversations.

    Log-normal with the medians of the sample trace `azure2023_conv_a` (1,015 and 115 tokens) and
    spreads that give its means (1,195 and 202).
    """
    rng = np.random.default_rng(seed)

    def tokens(median: float, mean: float) -> np.ndarray[Any, np.dtype[np.int64]]:
        spread = math.sqrt(2.0 * math.log(mean / median))
        drawn = rng.lognormal(math.log(median), spread, requests)
        return np.clip(np.rint(drawn), 1, DEFAULT_MAX_OUTPUT_TOKENS).astype(np.int64)

    return Trace(
        arrival_s=np.cumsum(rng.exponential(1.0 / rate_rps, requests)),
        input_tokens=tokens(1015.0, 1195.0),
        output_tokens=tokens(115.0, 202.0),
        max_output_tokens=np.full(requests, DEFAULT_MAX_OUTPUT_TOKENS, np.int64),
        session=np.zeros(requests, np.int64),
        priority=np.zeros(requests),
        block_start=np.zeros(requests + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=512,
        name="synthetic conversations",
    )


def _fleet(
    trace: Trace,
    program: Program | PythonPolicy,
    profile: Profile,
    replicas: int,
    *,
    jumps: bool = True,
) -> Simulation:
    specs = [ReplicaSpec(f"r{i}", profile) for i in range(replicas)]
    simulation = Simulation(trace, specs, Objective(), 0, jumps=jumps)
    simulation.allocate([SimCell(program, tuple(range(replicas)), tuple(range(SHARDS)))])
    return simulation


# --- the measured policies once more, as the author of a router would write them in Python --------


def _least_requests(_request: Request, replica: Replica, fleet: Fleet) -> float:
    turn = (replica.position - fleet.sequence) % fleet.replicas
    return (replica.in_flight + 1.0) / max(replica.speed, 0.01) + 0.001 * turn


def _prefix_affinity(request: Request, replica: Replica, fleet: Fleet) -> float:
    matched = replica.prefix_hit_tokens / max(request.input_tokens, 1.0)
    in_flight = replica.in_flight
    if matched > 0.3 and in_flight <= 1.5 * (fleet.in_flight / fleet.replicas) + 4.0:
        return -matched
    return in_flight + 0.001 * ((replica.position - fleet.sequence) % fleet.replicas)


def _weighted_scorer(request: Request, replica: Replica, fleet: Fleet) -> float:
    mean = fleet.in_flight / fleet.replicas
    idle = 1.0 - (replica.in_flight + replica.waiting) / (2.0 * mean + 1.0)
    queue = min(max(idle, 0.0), 1.0)
    memory = 1.0 - replica.kv_usage
    prefix = replica.prefix_hit_tokens / max(request.input_tokens, 1.0)
    tie = (replica.position / fleet.replicas + fleet.draw) % 1.0
    return 0.001 * tie - (2.0 * queue + 2.0 * memory + 3.0 * prefix)


PYTHON = {
    "least-requests": PythonPolicy(_least_requests),
    "prefix-affinity": PythonPolicy(_prefix_affinity),
    "weighted-scorer": PythonPolicy(_weighted_scorer),
}
"""Human arms in plain Python; they decide exactly as the compiled ones do."""
