"""Traces made of traces: one after the other, or all at once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopoiesis.twin.trace import Trace, gathered
from autopoiesis.twin.trace_columns import hashed


def splice(parts: Sequence[Trace], name: str) -> Trace:
    """Join traces in time: each begins one mean gap after the last arrival of what came before.

    Sessions and prefix blocks keep their ids, so that parts of one trace still share what they
    shared.

    Raises:
        ValueError: no part was given, or their prefix blocks are of different sizes.
    """
    begins_s = [0.0]
    for part in parts:
        mean_gap_s = part.duration_s / (len(part) - 1) if len(part) > 1 else 0.0
        begins_s.append(begins_s[-1] + part.duration_s + mean_gap_s)
    moved = [replace(p, arrival_s=p.arrival_s + at) for p, at in zip(parts, begins_s, strict=False)]
    return _in_order_of_arrival(moved, name, "splice")


def going_on(trace: Trace, since_s: float, until_s: float, times: int) -> Trace:
    """Return what arrives before `until_s`, and after it what arrives from `since_s` on, again and again.

    Sessions and prefix blocks keep their ids.
    """
    past = trace.until(until_s)
    again = past.select(np.flatnonzero(past.arrival_s >= since_s))
    every_s = until_s - since_s
    later = [replace(again, arrival_s=again.arrival_s + i * every_s) for i in range(1, times + 1)]
    return _in_order_of_arrival([past, *later], trace.name, "go on with")


def superpose(parts: Sequence[Trace], name: str) -> Trace:
    """Merge traces that run at the same time, by arrival; requests that tie keep the parts' order.

    Parts have nothing to do with each other: from the second on, sessions and prefix blocks get
    new ids, even where a trace is given twice.

    Raises:
        ValueError: no part was given, or their prefix blocks are of different sizes.
    """
    own = [part if i == 0 else _with_own_ids(part, f"{i}") for i, part in enumerate(parts)]
    return _in_order_of_arrival(own, name, "superpose")


def _with_own_ids(trace: Trace, salt: str) -> Trace:
    session = np.where(trace.session == 0, 0, hashed(trace.session, salt))
    return replace(trace, session=session, blocks=hashed(trace.blocks, salt))


def _in_order_of_arrival(parts: Sequence[Trace], name: str, to_do: str) -> Trace:
    if not parts:
        raise ValueError(f"there is nothing to {to_do}")
    sizes = {part.block_tokens: part.name for part in parts if len(part.blocks)}
    if len(sizes) > 1:
        raise ValueError(
            f"cannot {to_do} traces whose blocks have {' and '.join(map(str, sizes))} tokens"
        )
    arrival_s = np.concatenate([p.arrival_s for p in parts])
    order = np.argsort(arrival_s, kind="stable")
    counts = np.concatenate([np.diff(p.block_start) for p in parts])
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    block_start, blocks = gathered(start, np.concatenate([p.blocks for p in parts]), order)
    return Trace(
        arrival_s=arrival_s[order],
        input_tokens=np.concatenate([p.input_tokens for p in parts])[order],
        output_tokens=np.concatenate([p.output_tokens for p in parts])[order],
        max_output_tokens=np.concatenate([p.max_output_tokens for p in parts])[order],
        session=np.concatenate([p.session for p in parts])[order],
        priority=np.concatenate([p.priority for p in parts])[order],
        block_start=block_start,
        blocks=blocks,
        block_tokens=next(iter(sizes), parts[0].block_tokens),
        name=name,
    )
