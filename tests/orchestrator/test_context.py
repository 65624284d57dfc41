import numpy as np
import pytest

from autopoiesis.orchestrator.context import FEATURES, NAMES, Scaler, context_of


def window(rng: np.random.Generator, rate: float) -> dict[str, float]:
    n = rng.poisson(rate * 10)
    arrival = np.sort(rng.uniform(0, 10, n))
    tokens = rng.integers(1, 2000, n)
    return context_of(arrival, tokens, tokens // 2, tokens // 4, 0.0, 10.0, 0.3, 4)


def test_a_window_by_hand():
    c = context_of(
        np.array([0.0, 1.0, 2.0, 3.0]),
        np.array([10, 10, 10, 10]),
        np.array([4, 6]),
        np.array([0, 10, 0, 0]),
        started_s=21600.0,
        duration_s=4.0,
        kv_usage=0.5,
        replicas=3,
    )
    assert tuple(c) == NAMES
    assert c["log_rate_rps"] == pytest.approx(np.log(2))
    assert c["log_burstiness"] == pytest.approx(np.log(0.05))
    assert c["log_output_tokens_mean"] == pytest.approx(np.log(6))
    assert c["prefix_share"] == 0.25
    assert c["hour_sin"] == pytest.approx(1.0)


def test_an_empty_window_is_an_average_one_and_teaches_nothing():
    none = np.empty(0, np.int64)
    empty = context_of(np.empty(0), none, none, none, 0.0, 10.0, 0.0, 0)
    scaler = Scaler()
    scaler.update(empty)
    assert np.array_equal(scaler.standardise(empty), np.eye(FEATURES)[0])
    assert np.array_equal(scaler.standardise(None), np.eye(FEATURES)[0])


def test_standardised_contexts_are_centred_and_a_shift_stands_out():
    rng = np.random.default_rng(0)
    scaler = Scaler()
    vectors = []
    for _ in range(300):
        c = window(rng, 5.0)
        scaler.update(c)
        vectors.append(scaler.standardise(c))
    late = np.array(vectors[100:])
    assert np.all(late[:, 0] == 1.0)
    assert np.abs(late[:, 1:8].mean(axis=0)).max() < 0.3
    assert scaler.standardise(window(rng, 50.0))[NAMES.index("log_rate_rps")] == 3.0


def test_a_saved_scaler_scales_alike():
    rng = np.random.default_rng(0)
    scaler = Scaler()
    for _ in range(5):
        scaler.update(window(rng, 3.0))
    c = window(rng, 4.0)
    again = Scaler.from_arrays(scaler.to_arrays())
    assert np.array_equal(again.standardise(c), scaler.standardise(c))
    with pytest.raises(ValueError, match="version"):
        Scaler.from_arrays(scaler.to_arrays() | {"version": np.array([0.0, 1.0])})
