from dataclasses import replace

from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.triggers import Triggers, TriggerSettings

SETTINGS = TriggerSettings(regret=0.02, target=0.9, windows=3, cooldown_s=60.0, per_hour=4)


def consider(triggers, window, regret=0.0, best=1.0, drifted=(), at_s=None):
    return triggers.consider(window, window * 10.0 if at_s is None else at_s, regret, best, drifted)


def test_regret_must_last_and_be_certain():
    triggers = Triggers(SETTINGS)
    regrets = [0.05, 0.05, 0.0, 0.05, 0.05, 0.05]
    fired = [consider(triggers, w, r) for w, r in enumerate(regrets)]
    assert [t is not None for t in fired] == [False] * 5 + [True]
    trigger = fired[-1]
    assert trigger is not None
    assert (trigger.kind, trigger.window) == ("regret", 5)
    assert "\n" not in trigger.why


def test_drift_fires_at_once_and_is_remembered_over_a_pause():
    triggers = Triggers(SETTINGS)
    first = consider(triggers, 0, drifted=("reward",))
    assert first is not None
    assert "reward" in first.why
    assert consider(triggers, 1, drifted=("twin",)) is None
    later = consider(triggers, 6)
    assert later is not None
    assert "twin" in later.why
    assert consider(triggers, 20) is None


def test_another_fleet_is_a_reason_that_outlives_a_pause_and_a_restart():
    triggers = Triggers(SETTINGS)
    consider(triggers, 0, drifted=("reward",))
    triggers.capacity_changed(1, "r1 does not answer")
    triggers.capacity_changed(2, "r1 answers again")
    assert consider(triggers, 2) is None
    again = Triggers(SETTINGS)
    again.restore(triggers.to_dict())
    fired = consider(again, 9)
    assert (fired.kind, fired.since) == ("capacity", 1)
    assert "r1 answers again" in fired.why
    assert consider(again, 30) is None


def test_all_arms_below_target_is_a_reason():
    triggers = Triggers(SETTINGS)
    fired = [consider(triggers, w, best=0.7) for w in range(3)]
    assert [t.kind if t else None for t in fired] == [None, None, "target"]
    assert consider(Triggers(SETTINGS), 0, regret=None, best=None) is None


def test_while_all_is_well_policies_are_bred_for_a_surge_now_and_then():
    settings = replace(SETTINGS, per_hour=30)
    triggers = Triggers(settings)
    fired = [consider(triggers, w) for w in range(220)]
    # Whenever twice as much is known, and every ten minutes.
    assert [w for w, t in enumerate(fired) if t] == [5, 11, 23, 47, 95, 155, 215]
    assert all(t.kind == "surge" for t in fired if t)
    never = Triggers(Settings(synthesis_prepare_s=0.0).loop.triggers)
    assert not any(consider(never, w) for w in range(100))
    empty = Triggers(SETTINGS)
    assert not any(consider(empty, w, regret=None, best=None) for w in range(100))
    again = Triggers(settings)
    again.restore(triggers.to_dict())
    assert consider(again, 220) is None
    assert consider(again, 275) is not None


def test_one_cycle_at_a_time_then_a_pause():
    triggers = Triggers(SETTINGS)
    triggers.began()
    assert consider(triggers, 0, drifted=("reward",), at_s=0.0) is None
    triggers.ended(100.0)
    assert consider(triggers, 1, at_s=120.0) is None
    assert consider(triggers, 2, at_s=160.0) is not None


def test_the_hourly_budget_holds():
    triggers = Triggers(SETTINGS)
    fired = [consider(triggers, w, drifted=("reward",), at_s=w * 100.0) for w in range(37)]
    assert sum(t is not None for t in fired) == 5
    assert [t is not None for t in fired[:4]] == [True] * 4
    assert fired[36] is not None


def test_a_saved_memory_goes_on():
    triggers = Triggers(SETTINGS)
    consider(triggers, 0, regret=0.1)
    consider(triggers, 1, regret=0.1)
    again = Triggers(SETTINGS)
    again.restore(triggers.to_dict())
    assert consider(again, 2, regret=0.1) is not None
    assert again.to_dict() == {**again.to_dict()}
