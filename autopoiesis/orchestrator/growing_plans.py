"""Cycles that judge plans: what a brief becomes where slow functions may be carried out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopoiesis.arms.arm import Arm, arm_id, text_id
from autopoiesis.arms.seeds import slow_seeds
from autopoiesis.orchestrator.live_yards import cut_with_past, past_of
from autopoiesis.orchestrator.reconfigurations import measured_durations
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.yards import WINDOWS_EACH, planning_budget_s
from autopoiesis.synthesis.brief import Brief, Incumbent
from autopoiesis.synthesis.proposer import joined
from autopoiesis.telemetry.records import SynthesisRow
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.simulation import ReplicaSpec

LONG_WINDOWS = 8
"""Most windows of a cycle that judges plans; each is `WINDOWS_EACH` windows of the planner long."""
REQUESTS_PER_S = 1000
"""Requests that a cycle looks back on, for each second of its budget: more could not be replayed often enough."""


@dataclass(frozen=True, slots=True)
class PlanningBrief:
    """A brief whose candidates make plans, and whose incumbents are which arms."""

    brief: Brief
    arm_of: Mapping[str, str]
    """The arm behind each incumbent: one without slow functions has, in the brief, those that stand in."""

    def by_arm(self, row: SynthesisRow) -> SynthesisRow:
        """Return a cycle's row with the names that the registry has."""
        known = self.arm_of
        return replace(
            row,
            beaten=known.get(row.beaten, row.beaten),
            candidates=tuple(
                replace(c, parents=tuple(known.get(p, p) for p in c.parents))
                for c in row.candidates
            ),
        )


def planning_brief(
    brief: Brief,
    serving: Sequence[Arm],
    leading: str,
    fleet: Sequence[ReplicaSpec],
    settings: Settings,
    store: Store,
    now_s: float,
) -> PlanningBrief:
    """Let a brief ask for slow functions, too, on what telemetry has of the fleet's last windows.

    `fleet` is every replica that is or was there. Arms without slow functions stand with those that stand in for
    theirs. The human planners, with the fast functions of the `leading` arm, are raced first.

    Raises:
        BriefError: there are too few windows for plans yet.
        QueryError, TelemetryError: the telemetry cannot be read.
    """
    window_s = settings.window_s
    since_s = now_s - LONG_WINDOWS * WINDOWS_EACH * window_s
    budget_s = planning_budget_s(settings)
    most = round(REQUESTS_PER_S * budget_s)
    newest = store.query(
        f"select arrived_s from requests where arrived_s >= {since_s!r} order by arrived_s desc "  # noqa: S608
        f"limit 1 offset {most}"
    ).rows
    since_s = float(newest[0][0]) if newest else since_s
    recent, _ = observed(store.requests_between(since_s, now_s))
    windows, holdout, yards = cut_with_past(
        recent,
        past_of(store.query, since_s, now_s),
        fleet,
        window_s,
        measured_durations(store),
        settings.plans.max_changes,
        LONG_WINDOWS,
    )
    planners = {seed.name: seed.policy.source for seed in slow_seeds()}
    stand_in = planners[settings.slow_policy]
    pairs = {pair_id(arm.source, arm.slow or stand_in): arm for arm in serving}
    lead = next((arm for arm in serving if arm.id == leading), serving[0])
    starters = [joined(lead.source, slow) for slow in planners.values()]
    asked = replace(
        brief,
        windows=windows,
        holdout=holdout,
        yards=yards,
        warmup_s=window_s,
        budget_s=budget_s,
        incumbents=tuple(
            Incumbent(id_, arm.source, arm.origin, arm.name, arm.slow or stand_in)
            for id_, arm in pairs.items()
        ),
        archived=tuple(starters),
    )
    return PlanningBrief(asked, {id_: arm.id for id_, arm in pairs.items()})


def pair_id(fast: str, slow: str) -> str:
    """Return the id of the arm with these fast and slow functions."""
    return arm_id(text_id(fast), text_id(slow))
