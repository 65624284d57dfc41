"""The step model and its profiles."""

import math
from dataclasses import replace

import pytest

from autopoiesis.twin.latency import COEFFICIENTS, StepModel, at_speed, profile, profiles, step_s


def step_ms(name: str, decodes: int, context: int, chunk: int) -> float:
    coefficients = at_speed(profile(name).step, 1.0)
    prefills = int(chunk > 0)
    n = decodes + prefills
    pairs = 0.5 * chunk * chunk
    return 1e3 * step_s(
        coefficients, decodes + chunk, n, n, decodes, decodes * context, chunk, pairs, 0
    )


@pytest.mark.parametrize(
    ("name", "decodes", "context", "chunk", "expected_ms"),
    [  # worked values published with the coefficients
        ("h100-llama-3-8b-tp1-bf16", 1, 1024, 0, 7.19),
        ("h100-llama-3-8b-tp1-bf16", 32, 1024, 0, 8.77),
        ("h100-llama-3-8b-tp1-bf16", 128, 1024, 0, 13.84),
        ("h100-llama-3-8b-tp1-bf16", 0, 0, 2048, 41.9),
        ("h100-llama-3-8b-tp1-bf16", 32, 1024, 512, 15.6),
        ("a100-llama-3-70b-tp4-bf16", 128, 1024, 0, 48.56),
        ("a100-llama-3-70b-tp4-bf16", 0, 0, 2048, 330.4),
        ("a100-llama-3-70b-tp4-bf16", 32, 1024, 512, 102.8),
        ("h200-llama-3-8b-tp1-bf16", 128, 1024, 0, 10.87),
    ],
)
def test_worked_values(
    name: str, decodes: int, context: int, chunk: int, expected_ms: float
) -> None:
    assert step_ms(name, decodes, context, chunk) == pytest.approx(expected_ms, rel=3e-3)


def test_every_profile_loads_with_source_and_limits() -> None:
    assert len(profiles()) >= 20
    for name in profiles():
        p = profile(name)
        assert p.name == name
        assert p.source
        assert p.kv_blocks > 1000
        assert p.kv_block_tokens == 16
        assert p.max_num_seqs == (16 if name.startswith("cpu") else 256)
        assert p.max_num_batched_tokens == (8192 if name.startswith(("h100", "h200")) else 2048)
        assert not (name.startswith("h200") and p.validated)


def test_unknown_profile_lists_the_names() -> None:
    with pytest.raises(ValueError, match="h100-llama-3-8b-tp1-bf16"):
        profile("h1000")


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-3])
def test_coefficients_must_be_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(profile("h100-llama-3-8b-tp1-bf16").step, **{name: value})


def test_coefficients_survive_the_array() -> None:
    step = profile("a100-llama-3-8b-tp2-bf16").step
    assert StepModel.from_array(step.as_array()) == step


def test_speed_divides_every_step() -> None:
    step = profile("h100-llama-3-8b-tp1-bf16").step
    for sizes in ((8, 8, 8, 8, 9000, 0, 0.0, 0), (520, 9, 9, 8, 9000, 512, 131072.0, 64)):
        assert step_s(at_speed(step, 2.5), *sizes) == pytest.approx(
            step_s(at_speed(step, 1.0), *sizes) / 2.5
        )


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan, math.inf])
def test_speed_must_be_above_zero(speed: float) -> None:
    with pytest.raises(ValueError, match="speed"):
        at_speed(profile("h100-llama-3-8b-tp1-bf16").step, speed)


@pytest.mark.parametrize("field", ["kv_blocks", "max_num_seqs", "max_num_batched_tokens"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(profile("h100-llama-3-8b-tp1-bf16"), **{field: 0})
