import numpy as np
import pytest
from traffic import SHED_ALL, human, registry, written

from autopoiesis.arms.arm import State
from autopoiesis.orchestrator.lifecycle import (
    MEMORY,
    Lifecycle,
    LifecycleSettings,
    Switchback,
)
from autopoiesis.orchestrator.promotion import Promotion
from autopoiesis.telemetry.records import CellRow

HUMAN = human("least-requests")[0]
NEW = written(SHED_ALL, "new")
LIVE = written(SHED_ALL, "new", State.LIVE)


def row(
    arm_id: str, requests: int, shed: int, utility: float | None = None, failed: int = 0
) -> CellRow:
    utility = 1.0 - (shed + failed) / requests if utility is None else utility
    return CellRow(
        0, 0, arm_id, ("r0",), 32, 0.5, requests, requests - shed - failed, shed, failed, 0, 1, 1,
        None, None, None, 0.0, utility, 10.0,
    )  # fmt: skip


def test_an_arm_that_sheds_far_more_than_the_control_is_out_at_once():
    lifecycle = Lifecycle()
    moves = lifecycle.guard([HUMAN, NEW], [row(HUMAN.id, 50, 5), row(NEW.id, 50, 40)])
    assert [(m.arm_id, m.state) for m in moves] == [(NEW.id, State.QUARANTINED)]
    assert "80%" in moves[0].reason
    assert lifecycle.guard([HUMAN, NEW], [row(HUMAN.id, 50, 40), row(NEW.id, 50, 45)]) == []
    assert lifecycle.guard([HUMAN, NEW], [row(NEW.id, 5, 5)]) == []
    assert lifecycle.guard([HUMAN], [row(HUMAN.id, 50, 50)]) == []


def test_an_arm_that_refuses_and_earns_no_less_is_spared():
    guard = Lifecycle().guard
    late = row(HUMAN.id, 50, 0, utility=0.1)
    assert guard([HUMAN, NEW], [late, row(NEW.id, 50, 25, utility=0.5)]) == []
    (move,) = guard([HUMAN, NEW], [late, row(NEW.id, 50, 48, utility=0.04)])
    assert move.state is State.QUARANTINED
    # With the whole fleet to itself it is held against what the twin says of people's arms.
    alone = [row(NEW.id, 50, 25, utility=0.5)]
    assert guard([HUMAN, NEW], alone, {HUMAN.id: 0.2, NEW.id: 0.5}) == []
    assert guard([HUMAN, NEW], alone, {HUMAN.id: 0.9, NEW.id: 0.5}) != []
    # In a window of a burst it cannot earn what it is worth, only what the twin says of that window.
    burst = [row(NEW.id, 50, 30, utility=0.1)]
    assert guard([HUMAN, NEW], burst, {HUMAN.id: 0.2, NEW.id: 0.5}) != []
    assert guard([HUMAN, NEW], burst, {HUMAN.id: 0.2, NEW.id: 0.5}, {NEW.id: 0.2}) == []
    # Failing is not refusing.
    assert guard([HUMAN, NEW], [late, row(NEW.id, 50, 0, utility=0.5, failed=25)]) != []


def test_a_canary_that_earns_far_more_is_live_at_once_if_the_twin_agrees():
    def excelling(mine: float, twin: dict[str, float]) -> list[State]:
        rows = [row(HUMAN.id, 50, 0, utility=0.1), row(NEW.id, 50, 10, utility=mine)]
        return [m.state for m in Lifecycle().excelling([HUMAN, NEW], rows, twin)]

    assert excelling(0.5, {HUMAN.id: 0.1, NEW.id: 0.6}) == [State.LIVE]
    assert excelling(0.5, {HUMAN.id: 0.5, NEW.id: 0.5}) == []
    assert excelling(0.5, {}) == []
    assert excelling(0.15, {HUMAN.id: 0.1, NEW.id: 0.6}) == []


def test_the_canary_of_which_most_is_foreseen_has_the_next_cell():
    other = written(SHED_ALL.replace("replica.in_flight", "replica.in_flight + 1"), "other")
    lifecycle = Lifecycle()
    lifecycle.review([HUMAN, NEW, other], {HUMAN.id: (0.8, 50), NEW.id: (0.8, 50)}, 0.8)
    assert lifecycle.on_trial([HUMAN, NEW, other]) == other.id
    assert lifecycle.on_trial([HUMAN, NEW, other], {NEW.id: 0.02, other.id: 0.01}) == other.id
    assert lifecycle.on_trial([HUMAN, NEW, other], {NEW.id: 0.4, other.id: 0.1}) == NEW.id


def test_a_canary_of_which_a_proven_twin_foresees_harm_waits():
    lifecycle = Lifecycle()
    foreseen = {HUMAN.id: 0.1, NEW.id: -0.1}
    assert lifecycle.on_trial([HUMAN, NEW], foreseen) == NEW.id
    lifecycle.twin_is_proven = True
    assert lifecycle.on_trial([HUMAN, NEW], foreseen) is None
    assert lifecycle.on_trial([HUMAN, NEW], {HUMAN.id: 0.1, NEW.id: 0.05}) == NEW.id
    assert lifecycle.on_trial([HUMAN, NEW], {}) == NEW.id


def served(lifecycle: Lifecycle, difference: float, windows: int) -> list[tuple[int, State]]:
    moves = []
    for window in range(windows):
        utility = {HUMAN.id: (0.8, 50), NEW.id: (0.8 + difference, 50)}
        found = lifecycle.review([HUMAN, NEW], utility, 0.8)
        moves += [(window, m.state) for m in found]
        if found:
            break
    return moves


def test_a_canary_that_does_no_harm_becomes_live_soon():
    last = LifecycleSettings().canary_windows - 1
    assert served(Lifecycle(), 0.0, 100) == [(last, State.LIVE)]
    assert served(Lifecycle(), -0.05, 100) == [(last, State.LIVE)]


def test_a_harmful_canary_is_quarantined_when_it_is_shown():
    ((window, state),) = served(Lifecycle(), -0.3, 100)
    assert state is State.QUARANTINED
    assert 5 < window < 40


def test_without_a_control_cell_the_estimate_of_the_control_counts():
    lifecycle = Lifecycle()
    for _ in range(20):
        moves = lifecycle.review([HUMAN, NEW], {NEW.id: (0.4, 50)}, 0.9)
        if moves:
            break
    assert moves[0].state is State.QUARANTINED


def test_drift_gives_the_quarantined_another_chance_the_best_first():
    arms = [
        written(SHED_ALL.replace("replica.in_flight", f"replica.in_flight + {i}"), f"q{i}", state)
        for i, state in enumerate([State.QUARANTINED] * 3 + [State.RETIRED])
    ]
    means = {a.id: 0.1 * i for i, a in enumerate(arms)}
    moves = Lifecycle().second_chances([HUMAN, *arms], means)
    expected = [(arms[2].id, State.CANARY), (arms[1].id, State.CANARY)]
    assert [(m.arm_id, m.state) for m in moves] == expected


def test_weak_synthesized_arms_make_room_and_human_ones_never():
    lifecycle = Lifecycle(LifecycleSettings(max_serving=1))
    moves = lifecycle.superfluous([HUMAN, LIVE], {HUMAN.id: 0.1, LIVE.id: 0.9})
    assert [(m.arm_id, m.state) for m in moves] == [(LIVE.id, State.RETIRED)]


def test_a_canary_makes_room_once_it_has_waited_long_for_traffic_of_its_kind():
    lifecycle = Lifecycle(LifecycleSettings(max_serving=1))
    means = {HUMAN.id: 0.5, NEW.id: 0.1}
    for _ in range(MEMORY - 1):
        lifecycle.remember(means)
    assert lifecycle.superfluous([HUMAN, NEW], means) == []
    lifecycle.remember({HUMAN.id: 0.5})
    assert lifecycle.superfluous([HUMAN, NEW], means) == []
    for _ in range(MEMORY):
        lifecycle.remember(means)
    (move,) = lifecycle.superfluous([HUMAN, NEW], means)
    assert (move.arm_id, move.state) == (NEW.id, State.RETIRED)
    assert (
        registry(*human("least-requests"), NEW).move(move.arm_id, move.state, move.reason).state
        is State.RETIRED
    )


WANTED = {LIVE.id: 0.9, HUMAN.id: 0.1}


def settled_on_human() -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.settle_baseline([HUMAN, LIVE], WANTED)
    return lifecycle


def confirm(gain: float, twin: bool = True) -> tuple[Lifecycle, str | None]:
    lifecycle = settled_on_human()
    rng = np.random.default_rng(0)
    begun = None
    for window in range(10):
        begun = lifecycle.want(window, [HUMAN, LIVE], WANTED, twin, rng)
        if begun:
            break
    assert begun is not None
    trial = LifecycleSettings().trial if twin else LifecycleSettings().blind_trial
    assert begun.first_window == trial.after - 1
    assert sorted(begun.order) == sorted([LIVE.id, HUMAN.id] * trial.pairs)
    verdict = None
    over = begun.first_window + len(begun.order)
    for window in range(begun.first_window, over):
        arm = begun.arm_of(window)
        verdict = lifecycle.compare(window, 0.8 + (gain if arm == LIVE.id else 0.0))
    assert begun.arm_of(over) is None
    return lifecycle, verdict


def test_a_switchback_confirms_an_arm_for_the_whole_fleet():
    lifecycle, verdict = confirm(+0.05)
    assert verdict is not None
    assert verdict.startswith("confirmed")
    assert lifecycle.limits([HUMAN, LIVE]).arms() == frozenset()
    again = Lifecycle()
    again.restore(lifecycle.to_dict())
    assert again.limits([HUMAN, LIVE]).arms() == frozenset()


def test_an_arm_far_above_what_the_twin_says_of_the_control_is_confirmed_by_its_first_window():
    lifecycle = settled_on_human()
    far_ahead = {LIVE.id: 0.2, HUMAN.id: -0.1}
    begun = lifecycle.want(0, [HUMAN, LIVE], WANTED, True, np.random.default_rng(0), far_ahead)
    assert begun is not None
    assert begun.order == (LIVE.id, LIVE.id, HUMAN.id, HUMAN.id)
    assert lifecycle.compare(0, 0.05, levelled=True) is None
    verdict = lifecycle.compare(1, 0.35, levelled=True)
    assert verdict == "confirmed by a switchback: +0.200 against the control"
    assert lifecycle.limits([HUMAN, LIVE]).arms() == frozenset()


def proving(on: Lifecycle) -> Lifecycle:
    on.twin_is_proven = True
    return on


@pytest.mark.parametrize(("gain", "confirmed"), [(0.02, True), (-0.05, True), (-0.2, False)])
def test_a_proven_twin_stands_for_the_control_of_a_switchback(gain, confirmed):
    lifecycle = proving(settled_on_human())
    begun = lifecycle.want(0, [HUMAN, LIVE], WANTED, True, np.random.default_rng(0))
    assert begun is not None
    assert set(begun.order) == {LIVE.id}
    verdict = lifecycle.compare(0, gain, levelled=True)
    assert verdict is not None
    assert verdict.startswith("confirmed") is confirmed
    assert lifecycle.switchback is None
    assert (LIVE.id not in lifecycle.limits([HUMAN, LIVE]).unconfirmed) is confirmed


def test_a_trial_without_a_control_says_so_when_the_twin_is_proven_no_longer():
    lifecycle = proving(settled_on_human())
    begun = lifecycle.want(0, [HUMAN, LIVE], WANTED, True, np.random.default_rng(0))
    assert begun is not None
    lifecycle.twin_is_proven = False
    verdicts = [lifecycle.compare(w, 0.01, levelled=True) for w in range(len(begun.order))]
    assert verdicts[:-1] == [None] * (len(begun.order) - 1)
    assert (
        verdicts[-1] == "the twin, which stood for the control, is proven no longer; not confirmed"
    )
    assert LIVE.id in lifecycle.limits([HUMAN, LIVE]).unconfirmed


def test_a_window_of_which_the_twin_says_nothing_confirms_nobody():
    lifecycle = proving(settled_on_human())
    begun = lifecycle.want(0, [HUMAN, LIVE], WANTED, True, np.random.default_rng(0))
    assert begun is not None
    verdicts = [lifecycle.compare(w, None, levelled=False) for w in range(len(begun.order))]
    assert verdicts[:-1] == [None] * (len(begun.order) - 1)
    assert verdicts[-1] == "switchback without requests; not confirmed"
    assert lifecycle.limits([HUMAN, LIVE]).unconfirmed == {LIVE.id}


def test_a_canary_serves_fewer_windows_while_the_twin_is_proven():
    def windows(lifecycle: Lifecycle) -> int:
        served = {HUMAN.id: (0.8, 50), NEW.id: (0.8, 50)}
        return next(n for n in range(1, 9) if lifecycle.review([HUMAN, NEW], served, 0.8))

    assert windows(Lifecycle()) == LifecycleSettings().canary_windows
    assert windows(proving(Lifecycle())) == LifecycleSettings().proven_canary_windows


PROMISED = {LIVE.id: 0.4, HUMAN.id: -0.1}


def test_a_canary_is_tried_by_the_whole_fleet_if_more_is_promised_than_can_be_lost():
    def begun(earning: float) -> Switchback | None:
        rng = np.random.default_rng(0)
        control = {HUMAN.id: earning}
        return settled_on_human().want(0, [HUMAN, NEW], WANTED, True, rng, PROMISED, control)

    assert begun(0.9) is None
    trial = begun(0.3)
    assert trial is not None
    assert trial.order[0] == NEW.id


def test_a_canary_that_is_confirmed_is_live():
    arms = registry(HUMAN, NEW)
    lifecycle = settled_on_human()
    rng, nothing = np.random.default_rng(0), {HUMAN.id: 0.0}
    said: list[str] = []
    promotion = Promotion(arms, lifecycle, lambda _kind, _who, what: said.append(what))
    assert lifecycle.want(0, [HUMAN, NEW], WANTED, True, rng, PROMISED, nothing) is not None
    promotion.compare(0, {NEW.id: (0.5, 50)}, {HUMAN.id: 0.1, NEW.id: 0.5}, {})
    assert arms.get(NEW.id).state is State.LIVE
    assert said[0].startswith("confirmed")


def test_without_the_twin_a_switchback_comes_later_and_is_longer():
    _, verdict = confirm(+0.05, twin=False)
    assert verdict is not None
    assert verdict.startswith("confirmed")
    blind, trusted = LifecycleSettings().blind_trial, LifecycleSettings().trial
    assert (blind.after, blind.pairs) > (trusted.after, trusted.pairs)


def test_a_switchback_that_is_lost_leaves_the_limit_and_pauses():
    lifecycle, verdict = confirm(-0.2)
    assert verdict is not None
    assert verdict.startswith("not confirmed")
    assert lifecycle.limits([HUMAN, LIVE]).unconfirmed == {LIVE.id}
    rng = np.random.default_rng(0)
    begun = [lifecycle.want(w, [HUMAN, LIVE], WANTED, True, rng) is not None for w in range(6, 50)]
    trial = LifecycleSettings().trial
    assert begun.index(True) + 6 == 2 * trial.pairs + trial.after - 2 + trial.pause


@pytest.mark.parametrize(("earning", "again"), [(0.9, False), (0.05, True)])
def test_the_pause_after_a_lost_one_ends_where_nothing_is_to_be_lost(earning, again):
    lifecycle, _ = confirm(-0.2)
    rng, control = np.random.default_rng(0), {HUMAN.id: earning}
    begun = lifecycle.want(6, [HUMAN, LIVE], WANTED, True, rng, PROMISED, control)
    assert (begun is not None) is again


def test_a_human_arm_needs_a_switchback_too_but_for_the_first_that_leads():
    first, second = human("least-requests", "random")
    lifecycle = Lifecycle()
    assert lifecycle.limits([first, second]).unconfirmed == {first.id, second.id}
    lifecycle.settle_baseline([first, second], {first.id: 0.6, second.id: 0.4})
    lifecycle.settle_baseline([first, second], {first.id: 0.1, second.id: 0.9})
    assert lifecycle.limits([first, second]).unconfirmed == {second.id}
    begun = lifecycle.want(
        4, [first, second], {first.id: 0.1, second.id: 0.9}, True, np.random.default_rng(0)
    )
    assert begun is not None
    assert (begun.first_window, sorted(begun.order)) == (4, sorted([first.id, second.id]))
    lifecycle.compare(4, 0.8)
    assert (lifecycle.compare(5, 0.8) or "").startswith("confirmed")
    assert not lifecycle.limits([first, second]).arms()


def test_a_switchback_ends_with_its_arm():
    lifecycle = settled_on_human()
    rng = np.random.default_rng(0)
    for window in range(3):
        lifecycle.want(window, [HUMAN, LIVE], WANTED, True, rng)
    assert lifecycle.switchback is not None
    lifecycle.abandon(frozenset({HUMAN.id}))
    assert lifecycle.switchback is None
    assert lifecycle.compare(2, 0.5) is None


def test_a_specialist_is_kept_before_a_copy_that_is_better_on_average():
    lifecycle = Lifecycle(LifecycleSettings(max_serving=3))
    best, copy, specialist = (
        written(
            SHED_ALL.replace("replica.in_flight", f"replica.in_flight + {i}"), f"a{i}", State.LIVE
        )
        for i in range(3)
    )
    arms = [HUMAN, best, copy, specialist]
    for window in range(80):
        rare = window % 20 == 0
        worth = (0.1, 0.1, 0.1, 0.9) if rare else (0.5, 0.8, 0.79, 0.2)
        lifecycle.remember({a.id: u for a, u in zip(arms, worth, strict=True)})
    mean = {a.id: u for a, u in zip(arms, (0.5, 0.8, 0.79, 0.2), strict=True)}
    again = Lifecycle(lifecycle.settings)
    again.restore(lifecycle.to_dict())
    for mind in (lifecycle, again):
        (move,) = mind.superfluous(arms, mean)
        assert (move.arm_id, move.state) == (copy.id, State.RETIRED)
    assert len(lifecycle.to_dict()["memory"]) == 60
