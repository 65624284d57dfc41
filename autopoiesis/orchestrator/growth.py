"""From a trigger to new arms: the brief for the synthesizer, and what becomes of its answer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.orchestrator.triggers import Trigger
from autopoiesis.synthesis.brief import Brief, BriefError, Incumbent, Lesson, cut
from autopoiesis.synthesis.llm.clerk import Errand
from autopoiesis.synthesis.step import promoted_arms
from autopoiesis.telemetry.query import QueryResult
from autopoiesis.telemetry.records import SynthesisRow
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace

RACE_WORTH = 10.0
"""Observations that a race's word on a new arm is worth to the bandit."""
TOO_FEW = "There are too few requests to race policies on; wait for more or cut shorter windows."
UNSEEN_GATES = frozenset({"holdout", "tuning"})
UNSEEN = "it was ahead on the recent windows, but not surely on traffic that it had not seen"

LESSONS = """
select gate, reason, thought from candidates
where verdict = 'rejected' and not starts_with(reason, 'the budget ran out')
qualify row_number() over (partition by gate order by synthesis desc, gain desc nulls last) <= 3
order by synthesis desc, gain desc nulls last
"""
"""Why policies of earlier cycles were refused: the newest and best three of each gate."""


def brief_of(
    trigger: Trigger,
    recent: Trace,
    replicas: Sequence[ReplicaSpec],
    serving: Sequence[Arm],
    known: Collection[str],
    settings: Settings,
    lessons: Sequence[Lesson] = (),
    at_most: int = 12,
) -> Brief:
    """Ask for policies that would have served recent requests better; BriefError if they are too few.

    Each window is raced with the window before it as warm-up, which fills queues and caches.
    `known` are the ids of policies that need not be tried again. Of more than `at_most` windows the
    newest are taken.
    """
    if len(recent) < 2:
        raise BriefError(TOO_FEW)
    window_s = settings.window_s
    windows, holdout = cut(
        replace(recent, arrival_s=recent.arrival_s - recent.arrival_s[0]),
        window_s,
        window_s,
        at_most=at_most,
    )
    if not holdout:
        raise BriefError(TOO_FEW)
    return Brief(
        trigger=f"{trigger.kind}: {trigger.why}",
        objective=settings.objective,
        replicas=tuple(replicas),
        windows=windows,
        holdout=holdout,
        incumbents=tuple(Incumbent(a.id, a.source, a.origin, a.name) for a in serving),
        seed=settings.seed + trigger.window,
        budget_s=settings.cycle_budget_s,
        warmup_s=window_s,
        known=tuple(known),
        synthesizer=Origin(settings.synthesizer),
        folder=str(settings.data_dir / "synthesis"),
        policies_asked=settings.llm.policies,
        window=trigger.window,
        since_window=trigger.since,
        asked_s=trigger.at_s,
        lessons=tuple(lessons),
    )


def errand_of(
    settings: Settings, control_url: str = "", fleet: Mapping[str, str] | None = None
) -> Errand | None:
    """Return what a clerk needs to know to ask language models; None where none are asked.

    The fleet (base URLs by name) is asked through the instance at `control_url`, which knows when it
    is idle.
    """
    if settings.synthesizer not in {"openai", "fleet"}:
        return None
    asks_fleet = settings.synthesizer == "fleet"
    if asks_fleet and not control_url:
        raise SettingsError(
            "The fleet proposer asks the replicas of a running instance, and none runs here; start "
            "`autopoiesis serve`, or name an endpoint with --synthesizer openai and llm.base_url."
        )
    return Errand(
        settings=settings.llm.model_dump(mode="json"),
        folder=str(settings.data_dir / "synthesis"),
        seed=settings.seed,
        control_url=control_url if asks_fleet else "",
        fleet=dict(fleet or {}) if asks_fleet else {},
    )


def lessons_of(result: QueryResult) -> tuple[Lesson, ...]:
    """Return the lessons in the answer to `LESSONS`; of the hold-out nothing is told but that it failed."""
    return tuple(
        Lesson(gate, UNSEEN if gate in UNSEEN_GATES else reason, thought)
        for gate, reason, thought in result.rows
    )


def promoted_with_gain(row: SynthesisRow, now_s: float) -> list[tuple[Arm, float]]:
    """Return the promoted policies as arms, each with its gain over the arm `row.beaten`."""
    gains = {candidate.arm_id: candidate.gain or 0.0 for candidate in row.candidates}
    return [(arm, gains[arm.id]) for arm in promoted_arms(row, now_s)]


def take_in(
    row: SynthesisRow, registry: Registry, now_s: float, *, into_shadow: bool = True
) -> list[tuple[Arm, float]]:
    """Enter the promoted policies into shadow; return each with its gain over the arm `row.beaten`.

    One that the registry has in another state already is left as it is. Without `into_shadow` they
    stay candidates, which get no traffic until somebody promotes them.
    """
    promoted = [(registry.add(arm), gain) for arm, gain in promoted_with_gain(row, now_s)]
    if not into_shadow:
        return promoted
    return [
        (registry.move(arm.id, State.SHADOW, arm.reason), gain)
        for arm, gain in promoted
        if arm.state is State.CANDIDATE
    ]
