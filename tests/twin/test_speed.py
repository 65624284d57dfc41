"""What is measured is what is said; the rates themselves depend on the machine."""

from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.twin.latency import profile
from autopoiesis.twin.speed import (
    PolicySpeed,
    SpeedError,
    SpeedReport,
    at_rate,
    conversations,
    measure,
)

H100 = profile("h100-llama-3-8b-tp1-bf16")


def test_every_policy_is_measured_and_the_worst_figures_lead() -> None:
    said: list[str] = []
    report = measure(conversations(300, 1), H100, ["round-robin", "least-requests"], said.append)
    assert [p.policy for p in report.policies] == ["round-robin", "least-requests"]
    assert report.policies[0].python_rps is None
    assert report.policies[1].python_rps == report.python_rps
    assert min(p.compiled_rps for p in report.policies) == report.compiled_rps > 0
    assert len(said) == 3
    assert set(report.as_dict()) >= {"compiled_rps", "python_rps", "cost_ratio_64_to_8"}


def test_the_headline_figures() -> None:
    report = SpeedReport(
        "t",
        10,
        "p",
        1.0,
        (PolicySpeed("a", 300.0, 100.0, 50.0), PolicySpeed("b", 200.0, 40.0, None)),
    )
    assert (report.compiled_rps, report.python_rps, report.cost_ratio_64_to_8) == (200.0, 50.0, 5.0)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(SpeedError, match="no human arm 'nobody'; there are deadline-slack"):
        measure(conversations(10, 1), H100, ["nobody"])


def test_a_trace_without_duration_is_refused() -> None:
    burst = replace(conversations(10, 1), arrival_s=np.zeros(10))
    with pytest.raises(SpeedError, match="arrive at once"):
        measure(burst, H100)


def test_the_synthetic_trace_has_the_lengths_and_the_rate_it_says() -> None:
    trace = conversations(20_000, 5, rate_rps=10.0)
    assert np.median(trace.input_tokens) == pytest.approx(1015, rel=0.02)
    assert np.mean(trace.input_tokens) == pytest.approx(1195, rel=0.02)
    assert np.median(trace.output_tokens) == pytest.approx(115, rel=0.03)
    assert np.mean(trace.output_tokens) == pytest.approx(202, rel=0.05)
    assert len(trace) / trace.duration_s == pytest.approx(10.0, rel=0.03)
    assert len(trace) / at_rate(trace, 500.0).duration_s == pytest.approx(500.0)
    assert (conversations(50, 5).input_tokens != conversations(50, 6).input_tokens).any()
