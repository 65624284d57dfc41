"""From a trigger to new arms: the brief for the synthesizer, and what becomes of its answer."""

from collections.abc import Sequence
from dataclasses import replace

from autopoiesis.arms.arm import SERVING, Arm, Origin, State
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.observation import observed
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.replicas.fleet import Member
from autopoiesis.synthesis.brief import Brief, BriefError, Incumbent, cut
from autopoiesis.synthesis.step import promoted_arms
from autopoiesis.telemetry.records import RequestRecord, SynthesisRow
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec

WARMUP_SHARE = 1.0
"""Traffic before each window that fills queues and caches, in windows."""


def brief_of(
    trigger: Trigger,
    settings: Settings,
    records: Sequence[RequestRecord],
    members: Sequence[Member],
    registry: Registry,
) -> Brief | None:
    """Ask for policies that would have served the recent requests better; None if there are too few."""
    trace, _ = observed(records)
    if len(trace) < 2:
        return None
    trace = replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])
    warmup_s = WARMUP_SHARE * settings.window_s
    windows, holdout = cut(trace, settings.window_s, warmup_s)
    incumbents = [
        Incumbent(a.id, a.source, a.origin, a.name) for a in registry.all() if a.state in SERVING
    ]
    try:
        brief = Brief(
            trigger=f"{trigger.kind}: {trigger.why}",
            objective=settings.objective,
            replicas=tuple(ReplicaSpec(m.name, profile(m.profile), m.speed) for m in members),
            windows=windows,
            holdout=holdout,
            incumbents=tuple(incumbents),
            seed=settings.seed + trigger.window,
            budget_s=settings.synthesis_budget_s,
            warmup_s=warmup_s,
            known=tuple(a.id for a in registry.all() if a.state not in SERVING),
            synthesizer=Origin(settings.synthesizer),
            folder=str(settings.data_dir / "synthesis"),
            window=trigger.window,
            asked_s=trigger.at_s,
        )
    except BriefError:
        return None
    return brief if holdout else None


def take_in(row: SynthesisRow, registry: Registry, now_s: float) -> list[tuple[Arm, float]]:
    """Enter the promoted policies as canaries; return each with its gain over the arm `row.beaten`."""
    gains = {candidate.arm_id: candidate.gain or 0.0 for candidate in row.candidates}
    promoted = [registry.add(arm) for arm in promoted_arms(row, now_s)]
    return [(registry.move(arm.id, State.CANARY, arm.reason), gains[arm.id]) for arm in promoted]
