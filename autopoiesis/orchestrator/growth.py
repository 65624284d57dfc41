"""From a trigger to new arms: the brief for the synthesizer, and what becomes of its answer."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.synthesis.brief import Brief, BriefError, Incumbent, cut
from autopoiesis.synthesis.step import promoted_arms
from autopoiesis.telemetry.records import SynthesisRow
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

RACE_WORTH = 10.0
"""Observations that a race's word on a new arm is worth to the bandit."""


def brief_of(
    trigger: Trigger,
    recent: Trace,
    replicas: Sequence[ReplicaSpec],
    serving: Sequence[Arm],
    known: Collection[str],
    settings: Settings,
) -> Brief | None:
    """Ask for policies that would have served recent requests better; None if they are too few.

    Each window is raced with the window before it as warm-up, which fills queues and caches.
    `known` are the ids of policies that need not be tried again.
    """
    if len(recent) < 2:
        return None
    window_s = settings.window_s
    windows, holdout = cut(
        replace(recent, arrival_s=recent.arrival_s - recent.arrival_s[0]), window_s, window_s
    )
    if not holdout:
        return None
    try:
        return Brief(
            trigger=f"{trigger.kind}: {trigger.why}",
            objective=settings.objective,
            replicas=tuple(replicas),
            windows=windows,
            holdout=holdout,
            incumbents=tuple(Incumbent(a.id, a.source, a.origin, a.name) for a in serving),
            seed=settings.seed + trigger.window,
            budget_s=settings.synthesis_budget_s,
            warmup_s=window_s,
            known=tuple(known),
            synthesizer=Origin(settings.synthesizer),
            folder=str(settings.data_dir / "synthesis"),
            window=trigger.window,
            asked_s=trigger.at_s,
        )
    except BriefError:
        return None


def promoted_with_gain(row: SynthesisRow, now_s: float) -> list[tuple[Arm, float]]:
    """Return the promoted policies as arms, each with its gain over the arm `row.beaten`."""
    gains = {candidate.arm_id: candidate.gain or 0.0 for candidate in row.candidates}
    return [(arm, gains[arm.id]) for arm in promoted_arms(row, now_s)]


def take_in(row: SynthesisRow, registry: Registry, now_s: float) -> list[tuple[Arm, float]]:
    """Enter the promoted policies into shadow; return each with its gain over the arm `row.beaten`.

    One that the registry has in another state already is left as it is.
    """
    promoted = [(registry.add(arm), gain) for arm, gain in promoted_with_gain(row, now_s)]
    return [
        (registry.move(arm.id, State.SHADOW, arm.reason), gain)
        for arm, gain in promoted
        if arm.state is State.CANDIDATE
    ]
