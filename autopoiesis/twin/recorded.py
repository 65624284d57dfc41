"""Recorded requests as columns: as a trace to replay, as what came of them, and per replica."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.telemetry.records import OpenRequest, RequestRecord, Status
from autopoiesis.twin.outcome import Outcome
from autopoiesis.twin.outcome import Status as Ending
from autopoiesis.twin.trace import Trace

Floats = NDArray[np.float64]

NOBODYS = frozenset({Status.REJECTED, Status.ABORTED})
"""Requests that count against nobody: they were wrong, or the client went away."""
DEFAULT_OUTPUT_TOKENS = 128
"""Length taken for an answer that did not come, where no other tells better."""
_CODES = {
    Status.COMPLETED: Ending.COMPLETED,
    Status.SHED: Ending.SHED,
    Status.FAILED: Ending.FAILED,
}


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What one replica was sent, and how it answered, seen from the moment it was sent."""

    replica: str
    trace: Trace
    """The n requests in the order in which they were sent; times from the first one of the fleet."""
    ttft_s: Floats
    """(n,): NaN where no first token was seen."""
    tpot_s: Floats
    """(n,): NaN where it is not defined."""
    e2e_s: Floats
    """(n,): NaN unless completed."""

    def __len__(self) -> int:
        return len(self.ttft_s)


def recorded(requests: Sequence[RequestRecord]) -> tuple[Recorded, ...]:
    """Return what each replica was sent, by name; what reached none is left out."""
    sent = [_as_sent(r) for r in requests if r.replica and r.status not in NOBODYS]
    origin_s = min((r.arrived_s for r in sent), default=0.0)
    names = sorted({r.replica for r in sent})
    return tuple(_of_replica(n, [r for r in sent if r.replica == n], origin_s) for n in names)


def _as_sent(r: RequestRecord) -> RequestRecord:
    """Return the record as its replica saw it: without the time that the gateway held it."""
    return replace(
        r,
        arrived_s=r.arrived_s + r.held_s,
        held_s=0.0,
        ttft_s=None if r.ttft_s is None else max(r.ttft_s - r.held_s, 0.0),
        e2e_s=max(r.e2e_s - r.held_s, 0.0),
    )


def _of_replica(name: str, requests: Sequence[RequestRecord], origin_s: float) -> Recorded:
    trace, outcome = observed(requests)
    trace = replace(trace, arrival_s=trace.arrival_s - origin_s, name=name)
    return Recorded(name, trace, outcome.ttft_s, outcome.tpot_s, outcome.e2e_s)


def observed(
    records: Sequence[RequestRecord],
    unfinished: Sequence[OpenRequest] = (),
    replicas: Sequence[str] = (),
) -> tuple[Trace, Outcome]:
    """Return live requests as a trace to replay and as what came of them, row by row.

    Times are Unix seconds. `replicas` gives the names that the outcome's indexes mean. An answer
    that did not come is replayed as one of the mean length of those that did.
    """
    ended = [r for r in records if r.status not in NOBODYS]
    index = {name: i for i, name in enumerate(replicas)}
    lengths = [r.output_tokens for r in ended if r.status == Status.COMPLETED]
    usual = max(round(float(np.mean(lengths))), 1) if lengths else DEFAULT_OUTPUT_TOKENS
    rows = [_of_record(r, index, usual) for r in ended]
    rows += [_of_open(u, index, usual) for u in unfinished]
    rows.sort(key=lambda row: row.arrived_s)
    sizes = np.array([len(row.blocks) for row in rows], np.int64)
    trace = Trace(
        arrival_s=_floats([row.arrived_s for row in rows]),
        input_tokens=_ints([row.input_tokens for row in rows]),
        output_tokens=_ints([row.replayed_output_tokens for row in rows]),
        max_output_tokens=_ints([row.max_output_tokens for row in rows]),
        session=_ints([row.session for row in rows]),
        priority=_floats([row.priority for row in rows]),
        block_start=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        blocks=_ints([block for row in rows for block in row.blocks]),
        block_tokens=BLOCK_TOKENS,
        name="observed",
    )
    outcome = Outcome(
        arrival_s=trace.arrival_s,
        input_tokens=trace.input_tokens,
        output_tokens=_ints([row.output_tokens for row in rows]),
        shard=_ints([row.shard for row in rows]),
        cell=np.full(len(rows), -1, np.int64),
        replica=_ints([row.replica for row in rows]),
        dispatched_s=_floats([row.dispatched_s for row in rows]),
        first_token_s=_floats([row.first_token_s for row in rows]),
        finished_s=_floats([row.finished_s for row in rows]),
        status=_ints([row.status for row in rows]),
        cached_tokens=_ints([row.cached_tokens for row in rows]),
        generated_tokens=_ints([row.generated_tokens for row in rows]),
    )
    return trace, outcome


class _Row(NamedTuple):
    arrived_s: float
    input_tokens: int
    output_tokens: int
    replayed_output_tokens: int
    max_output_tokens: int
    session: int
    priority: float
    blocks: tuple[int, ...]
    shard: int
    replica: int
    dispatched_s: float
    first_token_s: float
    finished_s: float
    status: int
    cached_tokens: int
    generated_tokens: int


def _of_record(r: RequestRecord, index: dict[str, int], usual: int) -> _Row:
    completed = r.status == Status.COMPLETED
    nan = float("nan")
    output = max(r.output_tokens, 1) if completed else usual
    sent = bool(r.replica)
    return _Row(
        arrived_s=r.arrived_s,
        input_tokens=max(r.input_tokens, 1),
        output_tokens=r.output_tokens,
        replayed_output_tokens=output,
        max_output_tokens=max(r.max_output_tokens, output),
        session=r.session,
        priority=r.priority_class,
        blocks=r.blocks,
        shard=r.shard,
        replica=index.get(r.replica, -1),
        dispatched_s=r.arrived_s + r.held_s if sent else nan,
        first_token_s=nan if r.ttft_s is None else r.arrived_s + r.ttft_s,
        # The first chunk is timed by the picker, the end by Envoy: the end never comes before.
        finished_s=r.arrived_s + max(r.e2e_s, r.ttft_s or 0.0) if completed else nan,
        status=_CODES[r.status],
        cached_tokens=r.cached_tokens,
        generated_tokens=r.output_tokens,
    )


def _of_open(u: OpenRequest, index: dict[str, int], usual: int) -> _Row:
    return _Row(
        arrived_s=u.arrived_s,
        input_tokens=max(u.input_tokens, 1),
        output_tokens=0,
        replayed_output_tokens=min(usual, max(u.max_output_tokens, 1)),
        max_output_tokens=max(u.max_output_tokens, 1),
        session=u.session,
        priority=u.priority_class,
        blocks=u.blocks,
        shard=u.shard,
        replica=index.get(u.replica, -1),
        dispatched_s=u.arrived_s if u.replica else float("nan"),
        first_token_s=float("nan") if u.first_token_s is None else u.first_token_s,
        finished_s=float("nan"),
        status=Ending.PENDING,
        cached_tokens=u.cached_tokens,
        generated_tokens=u.generated_tokens,
    )


def _floats(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)


def _ints(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)
