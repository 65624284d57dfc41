import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopoiesis.orchestrator.foresight import KEEP, Foresight
from autopoiesis.orchestrator.replays import LONG_SHARE, advantages, lean_of

words = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=12)


@given(words)
def test_what_is_foreseen_lies_within_what_was_said(said):
    foresight = Foresight()
    for word in said:
        foreseen = foresight.take_in({"a": word})
    assert min(said) - 1e-9 <= foreseen["a"] <= max(said) + 1e-9


def test_a_single_word_does_not_turn_it_and_a_lasting_change_does():
    foresight = Foresight()
    for _ in range(10):
        foresight.take_in({"a": 0.2, "b": -0.2})
    once = foresight.take_in({"a": -0.1, "b": 0.1})
    assert once["a"] > once["b"]
    for _ in range(5):
        turned = foresight.take_in({"a": -0.2, "b": 0.2})
    assert turned["a"] < turned["b"]


def test_a_new_arm_is_judged_by_the_words_on_it_and_one_that_is_gone_is_forgotten():
    foresight = Foresight()
    foresight.take_in({"a": 0.1, "b": 0.3})
    assert foresight.take_in({"a": 0.1, "new": 0.4}) == pytest.approx({"a": 0.1, "new": 0.4})
    assert foresight.take_in({"b": -0.5}) == {"b": -0.5}


def test_it_is_restored_as_it_was():
    foresight, again = Foresight(), Foresight()
    foresight.take_in({"a": 0.5})
    again.restore(foresight.to_dict())
    word = {"a": 0.0}
    assert again.take_in(word) == foresight.take_in(word)
    assert again.to_dict()["a"] == pytest.approx([0.5 * KEEP, 1.0 + KEEP])


def test_half_of_what_is_expected_of_an_arm_is_the_long_run():
    said, worth = {"a": 0.9, "b": 0.5, "c": 0.1}, {"a": 0.4, "b": 0.5}
    lean = lean_of(worth, said)
    assert lean == pytest.approx({"a": -0.5 * LONG_SHARE / 2, "b": 0.5 * LONG_SHARE / 2})
    assert advantages(said) == pytest.approx({"a": 0.4, "b": 0.0, "c": -0.4})
    assert lean_of({}, said) == advantages({}) == {}
