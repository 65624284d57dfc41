"""The twin against per-request times of two real vLLM runs (traces/README.md has their source)."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from autopoiesis.arms.features import FIRST_CONSTANT, FIRST_REPLICA
from autopoiesis.arms.machine import Op, Program
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.latency import Profile, profile
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.roofline import composed
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace

TRACES = Path(__file__).parents[2] / "traces"
LEAST_IN_FLIGHT = Program(
    code=np.array([[Op.RETURN, 0, FIRST_REPLICA, 0]], np.int32),
    entry=np.array([0, -1, -1, -1], np.int64),
    registers=np.zeros(FIRST_CONSTANT),
    constants=0,
)
RUNS = ["rtx4090-llama-3.1-8b-tp1-bf16", "rtxpro6000-llama-3.1-8b-tp1-bf16"]


def replayed(
    name: str, profile_of: Callable[[str], Profile]
) -> tuple[Outcome, dict[str, np.ndarray]]:
    """Serve the run's requests on its own engine; return the twin's outcome and the real times."""
    file = pq.ParquetFile(TRACES / f"vllm_truth_{name.partition('-')[0]}_llama-31-8b.parquet")
    meta = {k.decode(): v.decode() for k, v in file.schema_arrow.metadata.items()}
    real = {k: np.asarray(v) for k, v in file.read().to_pydict().items()}
    order = np.argsort(real["arrival_s"], kind="stable")
    real = {k: v[order] for k, v in real.items()}
    n = len(order)
    trace = Trace(
        arrival_s=real["arrival_s"],
        input_tokens=real["input_tokens"].astype(np.int64),
        output_tokens=real["output_tokens"].astype(np.int64),
        max_output_tokens=np.full(n, 4096, np.int64),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.empty(0, np.int64),
        block_tokens=512,
        name=name,
    )
    engine: Profile = replace(
        profile_of(name),
        max_num_seqs=int(meta["max_num_seqs"]),
        max_num_batched_tokens=int(meta["max_num_batched_tokens"]),
    )
    outcome = run_arm(trace, [ReplicaSpec("r", engine)], LEAST_IN_FLIGHT, Objective(), seed=0)
    return outcome, real


def errors(
    name: str, profile_of: Callable[[str], Profile] = profile
) -> dict[str, tuple[float, float, float]]:
    """Return, per metric, the twin's relative error of mean and p99, and of the median request."""
    twin, real = replayed(name, profile_of)
    pairs = {
        "TTFT": (twin.ttft_s, real["first_token_s"] - real["arrival_s"]),
        "TPOT": (
            twin.tpot_s,
            (real["last_token_s"] - real["first_token_s"]) / (real["output_tokens"] - 1),
        ),
        "E2E": (twin.e2e_s, real["last_token_s"] - real["arrival_s"]),
    }
    return {
        metric: (
            float(ours.mean() / theirs.mean() - 1),
            float(np.percentile(ours, 99) / np.percentile(theirs, 99) - 1),
            float(np.median(np.abs(ours / theirs - 1))),
        )
        for metric, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_times_are_those_of_the_real_engine(name: str) -> None:
    for metric, (mean, p99, _) in errors(name).items():
        assert abs(mean) < 0.05, metric
        assert abs(p99) < 0.07, metric


if __name__ == "__main__":
    chosen = composed if sys.argv[1:] == ["--roofline"] else profile
    for run in RUNS:
        for label, (of_mean, of_p99, of_request) in errors(run, chosen).items():
            sys.stdout.write(
                f"{run:<36}{label:<6}mean {of_mean:+6.1%}  p99 {of_p99:+6.1%}  median request {of_request:5.1%}\n"
            )
