"""Known kinds of traffic bring their arms back; memory is bounded and outlives the process."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_loop import Drive
from traffic import LONG_ONLY, SHORT_ONLY, person_s, registry, steady

from autopoiesis.orchestrator.context import NAMES
from autopoiesis.orchestrator.loop import WindowLoop
from autopoiesis.orchestrator.regimes import MOST_RECALLED, MOST_REGIMES, Regimes
from autopoiesis.twin.composition import splice


def context(rate_rps: float, input_tokens: float = 1000.0, output_tokens: float = 200.0) -> dict:
    values = dict.fromkeys(NAMES, 0.0) | {"bias": 1.0, "log_rate_rps": np.log1p(rate_rps)}
    lengths = {"log_input_tokens_mean": input_tokens, "log_input_tokens_p90": 2 * input_tokens,
               "log_output_tokens_mean": output_tokens}  # fmt: skip
    return values | {name: float(np.log1p(tokens)) for name, tokens in lengths.items()}


CHAT, CODE = context(10.0), context(10.0, 3000.0, 30.0)


def lived(regimes: Regimes, kind: dict, windows: int, gains: dict[str, float]) -> Regimes:
    for _ in range(windows):
        regimes.enter(kind)
        regimes.learn(kind, {arm: (gain, 1.0) for arm, gain in gains.items()})
    return regimes


def test_a_known_regime_recalls_its_own_arms_at_once():
    regimes = Regimes()
    regimes.meet(["a", "b"])
    lived(regimes, CHAT, 6, {"a": 0.1, "b": -0.1})
    lived(regimes, CODE, 40, {"a": -0.2, "b": 0.2})
    assert regimes.champion(["a", "b"]) == "b"
    regimes.enter(context(11.0, 1100.0, 190.0))
    assert regimes.returned
    assert regimes.champion(["a", "b"]) == "a"
    gain, weight = regimes.recalled()["a"]
    assert (round(gain, 6), weight) == (0.1, MOST_RECALLED)
    assert regimes.champion(["b"]) == "b"
    assert regimes.successor(["a", "b"], "b") == "a"
    assert regimes.successor(["a", "b"], "a") is None
    regimes.enter(CHAT)
    assert regimes.successor(["a", "b"], "b") is None


def test_a_new_regime_knows_nobody_and_nothing_has_returned():
    regimes = Regimes()
    regimes.meet(["a"])
    lived(regimes, CHAT, 6, {"a": 0.1})
    regimes.enter(CODE)
    assert not regimes.returned
    assert regimes.recalled() == {}
    assert regimes.champion(["a"]) is None


def test_an_empty_window_leaves_the_present_regime():
    regimes = lived(Regimes(), CHAT, 5, {})
    regimes.enter(context(0.0))
    assert not regimes.returned
    assert regimes.present == 0


def test_slow_changes_are_followed_within_one_regime():
    regimes = Regimes()
    for i in range(100):
        regimes.enter(context(10.0 * 1.02**i))
    assert len(regimes) < 5


@given(st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(1.0, 1e5), st.booleans()), max_size=80))
def test_whatever_comes_memory_is_bounded_finite_and_saved_whole(windows):
    regimes = Regimes()
    for i, (rate_rps, tokens, learn) in enumerate(windows):
        regimes.meet([f"arm-{(i + k) % 7}" for k in range(5)])
        kind = context(rate_rps, tokens)
        regimes.enter(kind)
        if learn:
            regimes.learn(kind, {"arm-1": (0.1, 1.0), "arm-9": (0.5, 1.0)})
    assert len(regimes) <= MOST_REGIMES
    assert len(regimes.arms) <= 5
    again = Regimes.from_arrays(regimes.to_arrays())
    assert again.recalled() == regimes.recalled()
    assert (again.present, again.returned, len(again)) == (
        regimes.present, regimes.returned, len(regimes),
    )  # fmt: skip
    assert all(np.isfinite(array).all() for array in again.to_arrays().values())


def test_more_regimes_than_there_is_room_for_give_up_the_least_seen():
    regimes = Regimes()
    regimes.meet(["a"])
    lived(regimes, CHAT, 20, {"a": 0.3})
    for i in range(MOST_REGIMES + 5):
        regimes.enter(context(10.0, 10.0 * 3.0 ** (i % 12), 5.0 * 4.0 ** (i // 12)))
    regimes.enter(CHAT)
    assert round(regimes.recalled()["a"][0], 6) == 0.3


def test_after_a_switch_back_the_arm_of_a_known_regime_has_most_shards_within_two_windows():
    arms = registry(person_s(SHORT_ONLY, "short"), person_s(LONG_ONLY, "long"))
    short, long = (arms.get(name).id for name in ("short", "long"))
    parts = [steady(i, 8.0, 50.0, tokens) for i, tokens in enumerate([400, 4000, 400, 4000])]
    drive = Drive(arms, splice(parts, "there and back")).run(38)
    # Regimes change near windows 10, 20 and 30; the first change is to one that nobody knew.
    assert min(drive.share(short)[4:9]) > 0.8
    assert min(drive.share(long)[16:19]) > 0.8
    assert min(drive.share(short)[23:29]) > 0.8
    assert min(drive.share(long)[33:]) > 0.8
    told = [e.message for s in drive.settled for e in s.events if e.kind == "regime"]
    assert any("short did best" in message for message in told)
    assert any("long did best" in message for message in told)


def test_a_killed_loop_still_knows_its_regimes():
    arms = registry(person_s(SHORT_ONLY, "short"), person_s(LONG_ONLY, "long"))
    drive = Drive(arms, steady(0, 8.0, 60.0, 400)).run(8)
    again = WindowLoop(arms, drive.loop.objective, 0, state=drive.loop.state())
    assert again.beliefs.regimes.recalled() == drive.loop.beliefs.regimes.recalled()
    assert again.beliefs.regimes.champion([a.id for a in arms.all()]) == arms.get("short").id
    before_there_were_any = {k: v for k, v in drive.loop.state().items() if "regimes" not in k}
    old = WindowLoop(arms, drive.loop.objective, 0, state=before_there_were_any)
    assert old.beliefs.regimes.recalled() == {}
