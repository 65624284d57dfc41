"""Traces made of traces, perturbed ones, and the paper's phases."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_strategies import traces

from autopoiesis.twin.composition import splice, superpose
from autopoiesis.twin.perturbation import perturbed
from autopoiesis.twin.phases import (
    HETEROGENEOUS,
    PAPER_TRACES,
    SPOT_BUCKET_S,
    SPOT_GPUS,
    SPOT_PHASE_S,
    Phase,
    paper_capacity,
    paper_trace,
    phased,
)
from autopoiesis.twin.trace import Trace, read_trace

TRACES = Path(__file__).parents[2] / "traces"


def same(a: Trace, b: Trace) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Trace))


def requests(trace: Trace) -> list[tuple[float, ...]]:
    columns = (trace.arrival_s, trace.input_tokens, trace.output_tokens, trace.max_output_tokens,
               trace.priority, np.diff(trace.block_start))  # fmt: skip
    return list(zip(*(c.tolist() for c in columns), strict=True))


# --- superpose and splice ---------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(traces(block_tokens=256), min_size=1, max_size=4))
def test_superposed_traces_keep_every_request_and_are_in_order(parts: list[Trace]) -> None:
    together = superpose(parts, "all")
    assert (np.diff(together.arrival_s) >= 0).all()
    assert sorted(requests(together)) == sorted(r for part in parts for r in requests(part))
    assert len(together.blocks) == sum(len(p.blocks) for p in parts)
    assert same(together, superpose(parts, "all"))
    assert same(superpose(parts[:1], "t"), parts[0])


@settings(max_examples=80, deadline=None)
@given(traces())
def test_a_trace_superposed_on_itself_shares_nothing_with_itself(trace: Trace) -> None:
    twice = superpose([trace, trace], "twice")
    ids = np.unique(twice.blocks), np.unique(trace.blocks)
    assert len(ids[0]) == 2 * len(ids[1])
    sessions = np.unique(twice.session[twice.session != 0])
    assert len(sessions) == 2 * len(np.unique(trace.session[trace.session != 0]))
    assert (twice.session == 0).sum() == 2 * (trace.session == 0).sum()
    own = np.isin(twice.blocks, trace.blocks)
    assert twice.blocks[own].tolist() == trace.blocks.tolist()


def test_superposed_requests_that_tie_keep_the_order_of_their_traces() -> None:
    a = read_trace(TRACES / "azure2023_code_a.parquet").head(5)
    b = replace(a, input_tokens=a.input_tokens + 10_000)
    together = superpose([a, b], "both")
    assert (together.input_tokens[0::2] < 10_000).all()
    assert (together.input_tokens[1::2] > 10_000).all()


def test_superposed_real_traces_add_their_rates_and_keep_their_prefix_shares() -> None:
    conversation = read_trace(TRACES / "mooncake_conversation_a.parquet").slice(0.0, 600.0)
    code = read_trace(TRACES / "azure2023_code_a.parquet").slice(0.0, 600.0)
    both = superpose([code, conversation, conversation], "both")
    assert len(both) == len(code) + 2 * len(conversation)
    assert both.block_tokens == 512
    shared = conversation.summary().prefix_share * conversation.input_tokens.sum()
    total = both.summary().prefix_share * both.input_tokens.sum()
    assert total == pytest.approx(2 * shared)


@pytest.mark.parametrize("join", [splice, superpose])
def test_traces_with_blocks_of_different_sizes_are_not_joined(join) -> None:
    mooncake = read_trace(TRACES / "mooncake_conversation_a.parquet").head(3)
    code = read_trace(TRACES / "azure2023_code_a.parquet").head(3)
    assert join([mooncake, code], "both").block_tokens == 512
    assert join([code, mooncake], "both").block_tokens == 512
    with pytest.raises(ValueError, match="nothing"):
        join([], "none")
    with pytest.raises(
        ValueError, match=f"cannot {join.__name__} traces whose blocks have 512 and 256"
    ):
        join([mooncake, replace(mooncake, block_tokens=256)], "both")


def test_spliced_traces_follow_each_other_a_mean_gap_apart() -> None:
    mooncake = read_trace(TRACES / "mooncake_conversation_a.parquet").head(3)
    code = read_trace(TRACES / "azure2023_code_a.parquet").head(3)
    both = splice([mooncake, code], "both")
    assert (len(both), both.name) == (6, "both")
    assert both.arrival_s[3] == pytest.approx(mooncake.duration_s * 1.5)


# --- perturbation -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(traces(), st.integers(0, 2**32), st.floats(0.1, 10), st.floats(0, 1.5), st.floats(0, 1.5))
def test_a_perturbed_trace_keeps_order_number_and_prefixes(
    trace: Trace, seed: int, rate: float, length: float, burst: float
) -> None:
    def made() -> Trace:
        rng = np.random.default_rng(seed)
        return perturbed(trace, rng, rate=rate, length=length, burst=burst)

    future = made()
    assert same(future, made())
    assert len(future) == len(trace)
    assert (np.diff(future.arrival_s) >= 0).all()
    assert future.duration_s == pytest.approx(trace.duration_s / rate)
    for kept in ("blocks", "block_start", "session", "priority", "max_output_tokens"):
        assert np.array_equal(getattr(future, kept), getattr(trace, kept))
    assert (future.input_tokens >= 1).all()
    assert (future.output_tokens >= 1).all()
    whole = np.maximum(np.diff(trace.block_start) - 1, 0) * trace.block_tokens
    assert (future.input_tokens > np.minimum(whole, trace.input_tokens - 1)).all()


@settings(max_examples=30, deadline=None)
@given(traces(), st.integers(0, 100))
def test_no_spread_changes_nothing_but_the_rate(trace: Trace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    faster = perturbed(trace, rng, rate=2.0, length=0.0, burst=0.0)
    assert faster.arrival_s == pytest.approx(trace.arrival_s / 2)
    assert np.array_equal(faster.input_tokens, trace.input_tokens)
    assert np.array_equal(faster.output_tokens, trace.output_tokens)


@pytest.mark.parametrize("burst", [0.0, 0.5, 1.0])
def test_perturbing_makes_arrivals_as_bursty_as_promised(burst: float) -> None:
    trace = read_trace(TRACES / "azure2023_conv_a.parquet")
    rng = np.random.default_rng(1)
    future = perturbed(trace, rng, length=0.2, burst=burst).summary()
    was = trace.summary()
    promised = np.sqrt((1 + was.iat_cv**2) * np.exp(burst**2) - 1)
    assert future.iat_cv == pytest.approx(promised, rel=0.05)
    assert future.input_tokens_mean == pytest.approx(was.input_tokens_mean * np.exp(0.02), rel=0.02)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"rate": np.nan}, {"length": -1.0}, {"burst": np.inf}]
)
def test_a_perturbation_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    trace = read_trace(TRACES / "azure2023_conv_a.parquet").head(3)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        perturbed(trace, np.random.default_rng(0), **wrong)


# --- the paper's phases -----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PAPER_TRACES))
def test_phases_have_the_papers_counts_and_shapes(name: str) -> None:
    phases = PAPER_TRACES[name]
    trace = paper_trace(name, 0, phase_s=30.0)
    assert len(trace) == sum(p.requests for p in phases)
    for i, phase in enumerate(phases):
        part = trace.slice(i * 30.0, (i + 1) * 30.0)
        assert len(part) == phase.requests
        assert part.input_tokens.mean() == pytest.approx(phase.prefill_tokens, rel=0.04)
        assert part.output_tokens.mean() == pytest.approx(phase.decode_tokens, rel=0.04)
        assert (part.duration_s == 0.0) == (not name.startswith("spotserve"))


def test_another_seed_gives_other_lengths() -> None:
    a, b = (paper_trace("sharegpt", seed, phase_s=60.0) for seed in (0, 1))
    assert not np.array_equal(a.input_tokens, b.input_tokens)
    assert not np.array_equal(a.output_tokens, b.output_tokens)


def test_the_heterogeneous_cluster_gets_more_requests_of_the_same_shape() -> None:
    sharegpt = paper_trace("sharegpt", 0, phase_s=60.0, scale=HETEROGENEOUS)
    longbench = paper_trace("longbench", 0, phase_s=60.0, scale=HETEROGENEOUS)
    assert len(sharegpt) == 6 * 9216
    assert len(longbench) == 6 * 3110


def test_the_papers_cluster_grows_from_24_to_64_and_shrinks_to_43() -> None:
    assert (SPOT_GPUS[0], max(SPOT_GPUS), SPOT_GPUS[-1]) == (24, 64, 43)
    assert len(SPOT_GPUS) * SPOT_BUCKET_S == 120.0 == 4 * SPOT_PHASE_S
    cluster = paper_capacity()
    assert cluster.duration_s == 117.0
    assert cluster.replicas(16).tolist()[:3] == [6, 6, 7]
    assert cluster.replicas(16).max() == 16


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(Phase, st.just("p"), st.integers(1, 30), st.floats(1, 5000), st.floats(1, 2000)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2**32),
    st.floats(1, 100),
    st.floats(0, 1),
    st.floats(0.1, 3),
)
def test_phases_follow_each_other_and_repeat_from_their_seed(
    phases: list[Phase], seed: int, phase_s: float, share: float, scale: float
) -> None:
    def made(seed: int) -> Trace:
        return phased(phases, seed, phase_s=phase_s, arrive_s=share * phase_s, scale=scale)

    trace = made(seed)
    assert same(trace, made(seed))
    counts = [max(round(p.requests * scale), 1) for p in phases]
    assert len(trace) == sum(counts)
    begins = np.repeat(np.arange(len(phases)) * phase_s, counts)
    assert (trace.arrival_s >= begins).all()
    assert (trace.arrival_s <= begins + share * phase_s * (1 + 1e-9)).all()
    assert (trace.output_tokens <= trace.max_output_tokens).all()


@pytest.mark.parametrize(
    "wrong",
    [{"phase_s": 0.0}, {"arrive_s": 2.0}, {"arrive_s": -1.0}, {"scale": 0.0}, {"spread": np.nan}],
)
def test_phases_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        phased(PAPER_TRACES["sharegpt"], 0, **({"phase_s": 1.0} | wrong))
    with pytest.raises(ValueError, match="at least one phase"):
        phased([], 0, phase_s=1.0)
    with pytest.raises(ValueError, match="no trace 'azure'; it has sharegpt"):
        paper_trace("azure", 0, phase_s=1.0)
