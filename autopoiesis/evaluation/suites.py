"""The suites: which contestants meet in which scenarios, and how many seeds."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autopoiesis.evaluation.cluster import CLUSTERS
from autopoiesis.evaluation.contestants import OURS, SWITCHING, ablations, contestants
from autopoiesis.evaluation.effort import Effort
from autopoiesis.evaluation.live import VLLM_MODEL, VLLM_PYTHON, live_contestants
from autopoiesis.evaluation.scenario import FleetPlan, Market, Scenario, Segment
from autopoiesis.evaluation.slow_contestants import SlowEffort
from autopoiesis.evaluation.slow_contestants import contestants as slow_contestants
from autopoiesis.evaluation.unit import PlanScenario, PlanUnit, RequestUnit, Unit

CONV, CODE = "azure2023_conv_a", "azure2023_code_a"
MOONCAKE, AGENTIC = "mooncake_conversation_a", "agentic_coding_a"

SHORT = {CONV: "conv", CODE: "code", MOONCAKE: "mooncake", AGENTIC: "agentic"}

CHAT_FLEET = FleetPlan("a100-llama-3-70b-tp4-bf16", (1.0,) * 4)
LONG_FLEET = FleetPlan("h100-llama-3-8b-tp1-bf16", (1.0,) * 4)
UNEVEN = (1.0, 1.0, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Suite:
    """What one `bench` runs: every contestant in every scenario with every seed."""

    name: str
    scenarios: tuple[Scenario, ...] | tuple[PlanScenario, ...]
    contestants: tuple[str, ...]
    seeds: int
    effort: Effort | SlowEffort
    cost: str = "misses"
    """What gains are reductions of."""
    ours: str = OURS
    """The contestant that gains are of."""
    live: bool = False
    """Whether real processes serve, in real time: one unit after the other."""
    first_seed: int = 0

    def units(self, traces: Path) -> list[Unit]:
        """Return the units of work."""
        return [
            self._unit(scenario, contestant, seed, traces)
            for scenario in self.scenarios
            for contestant in self.contestants
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        ]

    def _unit(
        self, scenario: Scenario | PlanScenario, contestant: str, seed: int, traces: Path
    ) -> Unit:
        if isinstance(scenario, PlanScenario):
            assert isinstance(self.effort, SlowEffort)
            return PlanUnit(self.name, scenario, contestant, seed, self.effort)
        assert isinstance(self.effort, Effort)
        return RequestUnit(
            self.name, scenario, contestant, seed, self.effort, str(traces), self.live
        )


FULL = Effort()
QUICK = Effort(past_replays=1000, cycle_replays=1200, cycle_s=10.0, cooldown_s=60.0)


def dynamics(quick: bool) -> Suite:
    """Return traffic that changes: each trace, splices, shifts of rate, loss of capacity, mixed speeds."""
    return Suite(
        "dynamics",
        _quick_dynamics() if quick else _full_dynamics(),
        tuple(contestants()),
        2 if quick else 10,
        QUICK if quick else FULL,
    )


def agentic(quick: bool) -> Suite:
    """Return conversations of many turns over long shared prefixes."""
    past, judged = (200.0, 300.0) if quick else (600.0, 1200.0)
    fleet = FleetPlan("h100-llama-3-8b-tp1-bf16", (1.0,) * 4)
    base = Scenario(
        "agentic 85 %", (Segment(AGENTIC, 0.85, past),), (Segment(AGENTIC, 0.85, judged),),
        fleet, slo_ttft_s=5.0, slo_tpot_s=0.1, window_s=20.0,
    )  # fmt: skip
    more = (
        _at_load(base, 0.5),
        _at_load(base, 1.0),
        replace(base, name="agentic half KV", fleet=replace(fleet, kv_share=0.5)),
        replace(
            base,
            name="agentic to mooncake",
            judged=(Segment(AGENTIC, 0.85, judged / 2), Segment(MOONCAKE, 0.85, judged / 2)),
        ),
    )
    return Suite(
        "agentic",
        (base,) if quick else (base, *more),
        tuple(contestants()),
        2 if quick else 10,
        QUICK if quick else FULL,
    )


def live(quick: bool) -> Suite:
    """Return one splice on real processes: simulated replicas behind `serve`, loaded over HTTP."""
    few = ("human/least-requests", "human/least-tokens", "human/deadline-slack", SWITCHING, OURS)
    past_s, each_s = (40.0, 30.0) if quick else (120.0, 100.0)
    splice = _spliced(
        "conv, code, conv", ((CONV, 0.85), (CODE, 0.85), (CONV, 0.85)), past_s, each_s
    )
    return Suite(
        "live",
        (replace(splice, window_s=5.0), *_real(past_s, each_s)),
        few if quick else live_contestants(),
        1 if quick else 3,
        QUICK if quick else FULL,
        live=True,
    )


def _real(past_s: float, each_s: float) -> tuple[Scenario, ...]:
    """Return the splice, short and small, on two real vLLM servers, where this machine has one."""
    if not (os.environ.get(VLLM_PYTHON) and os.environ.get(VLLM_MODEL)):
        return ()

    def segment(trace: str, seconds: float) -> Segment:
        return Segment(trace, 0.4, seconds, lengths=1 / 16)

    return (
        Scenario(
            "real vLLM: conv, code, conv",
            (segment(CONV, past_s),),
            tuple(segment(trace, each_s) for trace in (CONV, CODE, CONV)),
            FleetPlan("cpu-tiny-llama-tp1-fp32", (1.0,) * 2),
            window_s=5.0,
            vllm=True,
        ),
    )


def ablation(quick: bool) -> Suite:
    """Return the learning system without one mechanism each, on the splices of `dynamics`."""
    whole = dynamics(quick)
    every = _quick_dynamics() if quick else _full_dynamics()
    chosen = [s for s in every if len(s.judged) > 1][: 2 if quick else None]
    names = [n for n in contestants() if n.startswith("human/")]
    others = [n for n in contestants() if "/" not in n]
    return replace(
        whole,
        name="ablation",
        scenarios=tuple(chosen),
        contestants=(*names, *others, *ablations()),
    )


QUICK_PAPER = {
    ("homogeneous", "sharegpt", "paper"),
    ("heterogeneous", "sharegpt", "paper"),
    ("heterogeneous", "sharegpt", "replica"),
    ("elastic", "spotserve-1", "paper"),
}


def paper(quick: bool) -> Suite:
    """Return the paper's clusters and phases, with its costs of reconfiguration and with one per replica."""
    pairs = (("sharegpt", "longbench"), ("longbench", "sharegpt"))
    spot = (("spotserve-1", "spotserve-2"), ("spotserve-2", "spotserve-1"))
    scenarios = [
        PlanScenario(f"{cluster} {trace} ({costs} costs)", cluster, trace, past, costs)
        for costs in ("paper", "replica")
        for cluster in CLUSTERS
        for trace, past in (spot if cluster == "elastic" else pairs)
    ]
    return Suite(
        "paper",
        tuple(s for s in scenarios if not quick or (s.cluster, s.trace, s.costs) in QUICK_PAPER),
        tuple(slow_contestants()),
        2 if quick else 10,
        SlowEffort(past_tries=20, tries=6) if quick else SlowEffort(),
        cost="total_s",
    )


def _steady(trace: str, load: float, fleet: FleetPlan, past_s: float, judged_s: float) -> Scenario:
    long = trace == MOONCAKE
    return Scenario(
        f"{SHORT[trace]} {load * 100:.0f} %",
        (Segment(trace, load, past_s),),
        (Segment(trace, load, judged_s),),
        fleet,
        slo_ttft_s=5.0 if long else 1.0,
        window_s=20.0 if long else 10.0,
    )


def _at_load(scenario: Scenario, load: float) -> Scenario:
    name = scenario.name.rsplit(" ", 2)[0]
    return replace(
        scenario,
        name=f"{name} {load * 100:.0f} %",
        past=tuple(replace(s, load=load) for s in scenario.past),
        judged=tuple(replace(s, load=load) for s in scenario.judged),
    )


def _spliced(
    name: str, parts: Sequence[tuple[str, float]], past_s: float, each_s: float
) -> Scenario:
    """Return a scenario whose past is the first regime and whose judged part goes through all."""
    segments = [Segment(trace, load, each_s) for trace, load in parts]
    long = any(trace == MOONCAKE for trace, _ in parts)
    return Scenario(
        name,
        (Segment(*parts[0], past_s),),
        tuple(segments),
        CHAT_FLEET,
        slo_ttft_s=5.0 if long else 1.0,
    )


def _quick_dynamics() -> tuple[Scenario, ...]:
    uneven = replace(CHAT_FLEET, speeds=UNEVEN)
    return (
        _steady(CONV, 0.5, CHAT_FLEET, 150.0, 200.0),
        replace(_steady(CONV, 0.85, uneven, 150.0, 200.0), name="mixed speeds"),
        _spliced("conv, code, conv", ((CONV, 0.85), (CODE, 0.85), (CONV, 0.85)), 150.0, 100.0),
        _spliced("rate shift", ((CONV, 0.6), (CONV, 1.1), (CONV, 0.6)), 150.0, 100.0),
    )


def _full_dynamics() -> tuple[Scenario, ...]:
    past_s, judged_s = 300.0, 600.0
    loads = (0.5, 0.7, 0.85, 1.0)
    steady = [
        *(_steady(CONV, load, CHAT_FLEET, past_s, judged_s) for load in loads),
        *(_steady(CODE, load, CHAT_FLEET, past_s, judged_s) for load in loads),
        *(_steady(MOONCAKE, load, LONG_FLEET, past_s, judged_s) for load in loads),
    ]
    base = _steady(CONV, 0.85, CHAT_FLEET, past_s, judged_s)
    uneven = replace(base, name="mixed speeds", fleet=replace(CHAT_FLEET, speeds=UNEVEN))
    long = _steady(MOONCAKE, 0.85, LONG_FLEET, past_s, judged_s)
    memory = [
        replace(
            s,
            name=f"{s.name.rsplit(' ', 2)[0]} KV {share:g}",
            fleet=replace(s.fleet, kv_share=share),
        )
        for s in (base, long)
        for share in (0.25, 0.5, 2.0)
    ]
    spot = [
        replace(
            base,
            name=f"spot {name}",
            past=tuple(replace(s, load=0.7) for s in base.past),
            judged=tuple(replace(s, load=0.7) for s in base.judged),
            fleet=replace(CHAT_FLEET, speeds=(1.0,) * 8),
            market=Market(file, speed),
        )
        for name, file, speed in (
            ("aws", "spot_aws_p3_v100", 45.6),
            ("gcp", "spot_gcp_a100", 108.0),
        )
    ]
    each_s = judged_s / 3
    splices = [
        _spliced("conv, code, conv", ((CONV, 0.85), (CODE, 0.85), (CONV, 0.85)), past_s, each_s),
        _spliced(
            "code, mooncake, code", ((CODE, 0.85), (MOONCAKE, 0.85), (CODE, 0.85)), past_s, each_s
        ),
        _spliced("rate shift", ((CONV, 0.6), (CONV, 1.1), (CONV, 0.6)), past_s, each_s),
    ]
    return (*steady, uneven, *memory, *spot, *splices)


SUITES = {
    "dynamics": dynamics,
    "paper": paper,
    "agentic": agentic,
    "live": live,
    "ablation": ablation,
}
