"""The columns that every trace format comes down to, and the checks that they pass."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.prefix import BLOCK_TOKENS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class TraceError(ValueError):
    """A trace that cannot be read: names the file, the row and the field."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What a file says, checked; `None` where it says nothing. Blocks are in CSR form."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    max_output_tokens: Ints | None
    session: Ints
    priority: Floats
    block_start: Ints
    blocks: Ints
    block_tokens: int


def refuse(path: Path, row: str, field: str, problem: str) -> NoReturn:
    """Raise a `TraceError` for one field of one row."""
    raise TraceError(f"{path}, {row}: `{field}` {problem}")


def checked(
    path: Path,
    row: Callable[[int], str],
    field: str,
    values: Sequence[Any] | NDArray[Any],
    least: float,
    *,
    whole: bool = False,
) -> Floats:
    """Return the values as finite floats of at least `least`; whole ones, if they must be."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        for i, value in enumerate(values):
            try:
                float(value)
            except (TypeError, ValueError, OverflowError):
                refuse(path, row(i), field, f"is {value!r}; it must be a number")
        raise
    wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= least) & (numbers <= 2**53)))
    if len(wrong):
        i = int(wrong[0])
        refuse(path, row(i), field, f"is {numbers[i]:g}; it must be finite and {least:g} to 2^53")
    if whole and len(broken := np.flatnonzero(numbers % 1.0)):
        i = int(broken[0])
        refuse(path, row(i), field, f"is {numbers[i]:g}; it must be a whole number")
    return numbers


def in_order(path: Path, row: Callable[[int], str], field: str, times: Floats) -> Floats:
    """Return the times, which must never fall."""
    back = np.flatnonzero(np.diff(times) < 0)
    if len(back):
        i = int(back[0]) + 1
        refuse(path, row(i), field, "is earlier than in the row before; sort the file by time")
    return times


def spread_ticks(times: Floats) -> Floats:
    """Spread the requests of one tick evenly over the gap to the next, or before the last."""
    ticks, count = np.unique(times, return_counts=True)
    if len(ticks) < 2:
        return times
    gaps = np.append(np.diff(ticks), ticks[-1] - ticks[-2])
    first = np.cumsum(count) - count
    place = np.arange(len(times)) - np.repeat(first, count)
    return np.repeat(ticks, count) + place * np.repeat(gaps / count, count)


def hashed(ids: Ints, salt: str) -> Ints:
    """Hash ids to non-zero int64 (the finaliser of SplitMix64), differently for each salt."""
    seed = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z == 0, np.uint64(1), z).view(np.int64)


def hashed_names(names: Iterable[str | None], salt: str) -> Ints:
    """Hash session names to non-zero int64; no name is 0."""
    known: dict[str | None, int] = {None: 0, "": 0}
    for name in names:
        if name not in known:
            digest = hashlib.blake2b(f"{salt}\0{name}".encode(), digest_size=8).digest()
            known[name] = int.from_bytes(digest, "little", signed=True) or 1
    return np.fromiter((known[name] for name in names), np.int64)


def without_blocks(
    arrival_s: Floats, input_tokens: Floats, output_tokens: Floats, session: Ints | None = None
) -> Columns:
    """Return columns for a format that knows no blocks; times count from the first request."""
    n = len(arrival_s)
    return Columns(
        arrival_s=arrival_s - arrival_s[0],
        input_tokens=input_tokens.astype(np.int64),
        output_tokens=np.maximum(output_tokens, 1.0).astype(np.int64),
        max_output_tokens=None,
        session=np.zeros(n, np.int64) if session is None else session,
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.zeros(0, np.int64),
        block_tokens=BLOCK_TOKENS,
    )
