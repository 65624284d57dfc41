"""Traces: the requests of a span of real traffic, as flat arrays."""

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from autopoiesis.atomic import replaced
from autopoiesis.twin.trace_columns import TraceError
from autopoiesis.twin.trace_formats import read_columns
from autopoiesis.twin.trace_parquet import HASHED_IDS

__all__ = ["Trace", "TraceError", "TraceSummary", "gathered", "read_trace", "write_trace"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DEFAULT_MAX_OUTPUT_TOKENS = 4096
"""The clients' limit where a trace tells none: one for all, so that it gives no length away."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A trace in a few figures."""

    name: str
    requests: int
    duration_s: float
    rate_rps: float
    iat_cv: float
    """Coefficient of variation of the time between arrivals (1 = Poisson)."""
    input_tokens_mean: float
    input_tokens_p50: float
    input_tokens_p99: float
    output_tokens_mean: float
    output_tokens_p50: float
    output_tokens_p99: float
    sessions: int
    prefix_share: float | None
    """Share of prompt tokens that one never-evicting cache would hold; None without block ids."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """n requests in order of arrival.

    Blocks are in CSR form: request i has `blocks[block_start[i]:block_start[i + 1]]`, equal ids
    meaning an equal prefix up to there.
    """

    arrival_s: Floats
    """(n,): seconds from the start of the trace, never falling."""
    input_tokens: Ints
    """(n,): at least 1."""
    output_tokens: Ints
    """(n,): at least 1; what the model produced. No policy may see it."""
    max_output_tokens: Ints
    """(n,): the client's limit."""
    session: Ints
    """(n,): hash of the session, 0 for none."""
    priority: Floats
    """(n,): 0 is normal, lower is more urgent."""
    block_start: Ints
    """(n + 1,)"""
    blocks: Ints
    """(total,): hashes, never 0. A request's last block may be partly filled."""
    block_tokens: int
    name: str

    def __post_init__(self) -> None:
        n, start = len(self.arrival_s), self.block_start
        for field in ("input_tokens", "output_tokens", "max_output_tokens", "session", "priority"):
            if len(getattr(self, field)) != n:
                raise ValueError(f"trace {self.name}: `{field}` needs {n} entries, one per arrival")
        if len(start) != n + 1 or start[0] != 0 or start[-1] != len(self.blocks):
            raise ValueError(f"trace {self.name}: `block_start` must run from 0 to len(blocks)")
        if np.any(np.diff(self.arrival_s) < 0) or np.any(np.diff(start) < 0):
            raise ValueError(f"trace {self.name}: `arrival_s` and `block_start` must not fall")
        if self.block_tokens < 1:
            raise ValueError(f"trace {self.name}: `block_tokens` must be at least 1")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Time of the last arrival [s]."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def blocks_of(self, i: int) -> Ints:
        """Return request i's block ids."""
        return self.blocks[self.block_start[i] : self.block_start[i + 1]]

    def slice(self, from_s: float, to_s: float) -> "Trace":
        """Return the requests that arrive in [from_s, to_s), their times counted from `from_s`."""
        first, last = np.searchsorted(self.arrival_s, [from_s, to_s])
        part = self.select(np.arange(first, max(first, last)))
        return replace(part, arrival_s=part.arrival_s - from_s)

    def until(self, to_s: float) -> "Trace":
        """Return the requests that arrive before `to_s`, their times as they are."""
        return self.head(int(np.searchsorted(self.arrival_s, to_s)))

    def head(self, n: int) -> "Trace":
        """Return the first n requests."""
        return self.select(np.arange(min(max(n, 0), len(self))))

    def select(self, rows: NDArray[np.integer[Any]]) -> "Trace":
        """Return some of the requests, their times as they are; `rows` must rise."""
        block_start, blocks = gathered(self.block_start, self.blocks, rows)
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            max_output_tokens=self.max_output_tokens[rows],
            session=self.session[rows],
            priority=self.priority[rows],
            block_start=block_start,
            blocks=blocks,
        )

    def speed(self, factor: float) -> "Trace":
        """Return the same requests arriving `factor` times as fast."""
        if not factor > 0:
            raise TraceError(f"a trace's speed must be above 0, not {factor}")
        return replace(self, arrival_s=self.arrival_s / factor)

    def summary(self) -> TraceSummary:
        """Describe the trace; NaN where too few requests say nothing."""
        gaps = np.diff(self.arrival_s)
        mean_gap = float(gaps.mean()) if len(gaps) else 0.0
        inputs, outputs = _mean_p50_p99(self.input_tokens), _mean_p50_p99(self.output_tokens)
        return TraceSummary(
            name=self.name,
            requests=len(self),
            duration_s=self.duration_s,
            rate_rps=len(self) / self.duration_s if self.duration_s > 0 else np.nan,
            iat_cv=float(gaps.std()) / mean_gap if mean_gap > 0 else np.nan,
            input_tokens_mean=inputs[0],
            input_tokens_p50=inputs[1],
            input_tokens_p99=inputs[2],
            output_tokens_mean=outputs[0],
            output_tokens_p50=outputs[1],
            output_tokens_p99=outputs[2],
            sessions=len(np.unique(self.session[self.session != 0])),
            prefix_share=self._prefix_share() if len(self.blocks) else None,
        )

    def _prefix_share(self) -> float:
        """Share of prompt tokens whose block an earlier request began with."""
        counts = np.diff(self.block_start)
        owner = np.repeat(np.arange(len(self)), counts)
        place = np.arange(len(self.blocks)) - np.repeat(self.block_start[:-1], counts)
        _, first, which = np.unique(self.blocks, return_index=True, return_inverse=True)
        seen = owner[first][which] < owner
        hits = counts.copy()
        np.minimum.at(hits, owner[~seen], place[~seen])
        cached = np.minimum(hits * self.block_tokens, self.input_tokens)
        return float(cached.sum() / self.input_tokens.sum())


def _mean_p50_p99(tokens: Ints) -> tuple[float, float, float]:
    if not len(tokens):
        return np.nan, np.nan, np.nan
    return float(tokens.mean()), float(np.median(tokens)), float(np.percentile(tokens, 99))


def gathered(start: Ints, items: Ints, rows: NDArray[np.integer[Any]]) -> tuple[Ints, Ints]:
    """Return some rows of lists in CSR form, in the order given, in the same form."""
    counts = np.diff(start)[rows]
    ends = np.cumsum(counts)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
        start[rows] - ends + counts, counts
    )
    return np.concatenate([np.zeros(1, np.int64), ends]), items[places]


def read_trace(path: str | PathLike[str]) -> Trace:
    """Read a trace: Parquet, Mooncake JSONL, Azure CSV or BurstGPT CSV.

    Requests that share one of Mooncake's coarse timestamps are spread evenly over the gap to the
    next; an output of 0 tokens counts as 1. Ids become hashes salted with the file's name, since
    ids of different files have nothing to do with each other.

    Raises:
        TraceError: one sentence with the file, the row and the field.
    """
    file = Path(path)
    columns = read_columns(file)
    limit = columns.max_output_tokens
    if limit is None:
        longest = int(columns.output_tokens.max())
        limit = np.full(len(columns.arrival_s), DEFAULT_MAX_OUTPUT_TOKENS, np.int64)
        if longest > DEFAULT_MAX_OUTPUT_TOKENS:
            limit[:] = 1 << (longest - 1).bit_length()
    return Trace(
        arrival_s=columns.arrival_s,
        input_tokens=columns.input_tokens,
        output_tokens=columns.output_tokens,
        max_output_tokens=limit,
        session=columns.session,
        priority=columns.priority,
        block_start=columns.block_start,
        blocks=columns.blocks,
        block_tokens=columns.block_tokens,
        name=file.stem,
    )


def write_trace(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a trace as zstd Parquet that `read_trace` reads back unchanged; whole or not at all.

    Raises:
        TraceError: the file cannot be written.
    """
    start = pa.array(trace.block_start, pa.int32())
    blocks = pa.ListArray.from_arrays(start, pa.array(trace.blocks))
    sessions = [str(s) if s else None for s in trace.session.tolist()]
    table = pa.table(
        {
            "arrival_s": trace.arrival_s,
            "input_tokens": trace.input_tokens,
            "output_tokens": trace.output_tokens,
            "max_output_tokens": trace.max_output_tokens,
            "priority": trace.priority,
            "session_id": pa.array(sessions, pa.string()),
            "block_hashes": blocks,
        }
    )
    metadata = {b"block_size_tokens": str(trace.block_tokens).encode(), HASHED_IDS: b"true"}
    target = Path(path)
    try:
        with replaced(target) as draft:
            pq.write_table(table.replace_schema_metadata(metadata), draft, compression="zstd")
    except OSError as error:
        raise TraceError(f"{target}: cannot be written ({error.strerror})") from error
