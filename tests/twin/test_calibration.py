"""Calibration against recordings whose truth is known, and validation on what was not fitted."""

import re
from dataclasses import replace

import numpy as np
import pytest
from recordings import H100, SLOWER, hidden, loads, record

from autopoiesis.twin.calibration import CalibrationError, calibrate, replay
from autopoiesis.twin.profile_files import ProfileError, read_profile, write_profile
from autopoiesis.twin.split import early_and_late, in_turns
from autopoiesis.twin.validation import plot, validate


@pytest.fixture(scope="module")
def truth():
    return hidden(SLOWER)


@pytest.fixture(scope="module")
def calibration(truth):
    return calibrate([record(truth, loads([2.0, 6.0, 4.0], 60.0, 1), 1)], H100)


def test_the_fitted_twin_predicts_loads_that_it_has_not_seen(truth, calibration):
    later = record(truth, loads([5.0, 3.0], 60.0, 2), 2)
    fitted = validate([later], calibration.profile)
    as_it_was = validate([later], H100)
    for comparison, before in zip(fitted.comparisons, as_it_was.comparisons, strict=True):
        limit = 0.1 if comparison.statistic in {"mean", "p50"} else 0.2
        assert abs(comparison.error) < limit, comparison
        if comparison.measure == "tpot_s":
            assert abs(before.error) > 0.3
    assert fitted.median_error["e2e_s"] < 0.06


def test_intervals_hold_what_is_true(truth, calibration):
    within = [
        c.low <= getattr(truth.step, c.name) <= c.high
        for c in calibration.coefficients
        if c.name in {"weights_s", "token_s", "decode_sequence_s", "decode_context_token_s"}
    ]
    assert sum(within) >= 3
    assert all(c.low <= c.value <= c.high for c in calibration.coefficients)


def test_errors_fall_and_the_source_is_told(calibration):
    assert calibration.error < 0.5 * calibration.error_before
    assert "720 requests of r0" in calibration.profile.source
    assert not calibration.profile.validated


def test_replicas_of_one_class_get_a_speed_each(truth):
    trace = loads([2.0, 5.0], 50.0, 3)
    recordings = [
        record(truth, trace, 4, name="a"),
        record(truth, loads([4.0, 2.0], 50.0, 5), 6, name="b", speed=0.6),
    ]
    assert calibrate(recordings, H100).speeds["b"] == pytest.approx(0.6, rel=0.1)


def test_too_few_requests_are_refused():
    few = record(H100, loads([2.0], 10.0, 1), 1)
    with pytest.raises(CalibrationError, match="20 streamed requests are too few"):
        calibrate([few], H100)


def test_an_engine_that_could_not_have_served_is_refused(truth):
    served = record(truth, loads([2.0], 60.0, 1), 1)
    with pytest.raises(CalibrationError, match="KV cache of 1600 tokens"):
        calibrate([served], replace(H100, kv_blocks=100))


@pytest.mark.parametrize("turn_s", [None, 15.0])
def test_only_what_is_to_be_fitted_is(truth, turn_s):
    whole = record(truth, loads([2.0, 5.0], 60.0, 7), 7)
    split = in_turns(turn_s) if turn_s else early_and_late([whole], 0.5)
    compared = split.compared(whole.trace.arrival_s)
    lies = replace(whole, ttft_s=np.where(compared, 99.0, whole.ttft_s))
    fitted, deceived = (calibrate([r], H100, split.fitted).profile.step for r in (whole, lies))
    assert fitted == deceived
    assert validate([lies], truth, split.compared).comparisons[0].observed == 99.0
    assert validate([lies], truth, split.fitted).comparisons[0].observed < 9.0


def test_turns_follow_each_other():
    split = in_turns(10.0)
    at_s = np.array([0.0, 9.9, 10.0, 19.9, 20.0])
    assert split.fitted(at_s).tolist() == [True, True, False, False, True]
    assert np.array_equal(split.compared(at_s), ~split.fitted(at_s))


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_splits_are_refused(truth, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        early_and_late([record(truth, loads([2.0], 10.0, 1), 1)], share)


@pytest.mark.parametrize("turn_s", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_turns_are_refused(turn_s):
    with pytest.raises(ValueError, match="longer than 0 s"):
        in_turns(turn_s)


def test_a_perfect_twin_has_no_error(truth):
    exact = record(truth, loads([3.0], 60.0, 8), 8, noise=0.0)
    ttft_s, tpot_s, e2e_s = replay(exact, truth)
    exact = replace(exact, ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=e2e_s)
    assert all(c.error == 0.0 for c in validate([exact], truth).comparisons)


def test_answers_that_come_in_one_piece_have_no_time_per_token_to_be_wrong_about(truth):
    some = record(truth, loads([3.0], 60.0, 8), 8)
    at_once = replace(some, tpot_s=np.zeros_like(some.tpot_s))
    validation = validate([at_once], truth)
    (median,) = [c for c in validation.comparisons if (c.measure, c.statistic) == ("tpot_s", "p50")]
    assert np.isnan([median.error, median.low, median.high]).all()
    assert np.isnan(validation.median_error["tpot_s"])
    assert validation.median_error["ttft_s"] < 0.5


def test_the_plot_is_a_picture(tmp_path, truth):
    validation = validate([record(truth, loads([3.0], 60.0, 8), 8)], H100)
    plot(validation, tmp_path / "v.svg")
    assert (tmp_path / "v.svg").read_text().lstrip().startswith("<?xml")


# --- profile files --------------------------------------------------------------------------------


def test_a_profile_comes_back_as_it_was_written(tmp_path, calibration):
    write_profile(calibration.profile, tmp_path / "mine.json")
    assert calibration.profile == read_profile(tmp_path / "mine.json")


def set_weights(text, value):
    return re.sub(r'"weights_s": [^,]+', f'"weights_s": {value}', text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace('"knee"', '"kneee"'), "`step` has no field 'kneee'"),
        (
            lambda t: t.replace('"kv_blocks": 27537', '"kv_blocks": 0'),
            "kv_blocks must be at least 1",
        ),
        (lambda t: t.replace('"kv_blocks": 27537', '"kv_blocks": 1.5'), "must be a whole number"),
        (lambda t: set_weights(t, "NaN"), "step.weights_s must be a finite number"),
        (lambda t: set_weights(t, "-1"), "step.weights_s must be a finite number"),
        (lambda t: set_weights(t, '"fast"'), "step.weights_s must be a number"),
        (lambda t: t.replace('"name"', '"nom"'), "the profile has no field 'nom'"),
        (lambda t: t.replace('"name": "h100-llama-3-8b-tp1-bf16",', ""), "name"),
        (lambda t: t[:100], "is not valid JSON"),
        (lambda t: "[]", "must be an object"),
    ],
)
def test_a_wrong_profile_file_is_refused_with_its_field(tmp_path, change, says):
    file = tmp_path / "p.json"
    write_profile(H100, file)
    changed = change(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(ProfileError, match=says) as refused:
        read_profile(file)
    assert str(file) in str(refused.value)


def test_a_missing_profile_file_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
