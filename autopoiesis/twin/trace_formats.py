"""Readers of the trace formats in use: each file becomes the same columns, or a named error."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from autopoiesis.arms.prefix import BLOCK_TOKENS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOONCAKE_BLOCK_TOKENS = 512
HASHED_IDS = b"hashed_ids"
"""Key in a Parquet file's metadata: session and block ids are hashes already."""


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


def read_columns(path: Path) -> Columns:
    """Read a trace, its format recognised by its content."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file; give the path of a trace") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror})") from error
    if not head.strip():
        raise TraceError(f"{path}: the file is empty; a trace has at least one request")
    if head.startswith(b"PAR1"):
        return _read_parquet(path)
    if head.lstrip().startswith(b"{"):
        return _read_mooncake(path)
    return _read_csv(path)


# --- checks -----------------------------------------------------------------------------------


def _refuse(path: Path, row: str, field: str, problem: str) -> NoReturn:
    raise TraceError(f"{path}, {row}: `{field}` {problem}")


def _checked(
    path: Path,
    row: Callable[[int], str],
    field: str,
    values: Sequence[Any] | NDArray[Any],
    least: float,
) -> Floats:
    """Return the values as finite floats of at least `least`."""
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        for i, value in enumerate(values):
            try:
                float(value)
            except (TypeError, ValueError, OverflowError):
                _refuse(path, row(i), field, f"is {value!r}; it must be a number")
        raise
    wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= least) & (numbers <= 2**53)))
    if len(wrong):
        i = int(wrong[0])
        _refuse(path, row(i), field, f"is {numbers[i]:g}; it must be finite and at least {least:g}")
    return numbers


def _in_order(path: Path, row: Callable[[int], str], field: str, times: Floats) -> Floats:
    back = np.flatnonzero(np.diff(times) < 0)
    if len(back):
        i = int(back[0]) + 1
        _refuse(path, row(i), field, "is earlier than in the row before; sort the file by time")
    return times


def _spread_ticks(times: Floats) -> Floats:
    """Spread the requests of one tick evenly over the gap to the next, or before the last."""
    ticks, count = np.unique(times, return_counts=True)
    if len(ticks) < 2:
        return times
    gaps = np.append(np.diff(ticks), ticks[-1] - ticks[-2])
    first = np.cumsum(count) - count
    place = np.arange(len(times)) - np.repeat(first, count)
    return np.repeat(ticks, count) + place * np.repeat(gaps / count, count)


def _hashed(ids: Ints, salt: str) -> Ints:
    """Hash ids to non-zero int64 (the finaliser of SplitMix64), differently for each salt."""
    seed = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z == 0, np.uint64(1), z).view(np.int64)


def _hashed_names(names: Iterable[str | None], salt: str) -> Ints:
    """Hash session names to non-zero int64; no name is 0."""
    known: dict[str | None, int] = {None: 0, "": 0}
    for name in names:
        if name not in known:
            digest = hashlib.blake2b(f"{salt}\0{name}".encode(), digest_size=8).digest()
            known[name] = int.from_bytes(digest, "little", signed=True) or 1
    return np.fromiter((known[name] for name in names), np.int64)


def _without_blocks(
    arrival_s: Floats, input_tokens: Floats, output_tokens: Floats, session: Ints | None = None
) -> Columns:
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


# --- Mooncake JSONL ---------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise TraceError(f"{path}, line {number}: is not valid JSON ({error})") from None
            if not isinstance(value, dict):
                raise TraceError(f"{path}, line {number}: must be a JSON object")
            yield number, cast("dict[str, Any]", value)


def _read_mooncake(path: Path) -> Columns:
    """Mooncake: timestamp [ms], input_length, output_length, hash_ids of 512 tokens."""
    lines: list[int] = []
    columns: dict[str, list[Any]] = {"timestamp": [], "input_length": [], "output_length": []}
    ids: list[int] = []
    start: list[int] = [0]
    for number, record in _json_lines(path):
        lines.append(number)
        for field, values in columns.items():
            value = record.get(field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                _refuse(path, f"line {number}", field, f"is {value!r}; it must be a number")
            values.append(value)
        hashes = record.get("hash_ids") or []
        if type(hashes) is not list or any(type(h) is not int for h in cast("list[Any]", hashes)):
            _refuse(path, f"line {number}", "hash_ids", "must be a list of whole numbers")
        ids.extend(cast("list[int]", hashes))
        start.append(len(ids))
    if not lines:
        raise TraceError(f"{path}: the file is empty; a trace has at least one request")

    def row(i: int) -> str:
        return f"line {lines[i]}"

    timestamp = _checked(path, row, "timestamp", columns["timestamp"], 0)
    arrival_s = _spread_ticks(_in_order(path, row, "timestamp", timestamp) / 1000.0)
    plain = _without_blocks(
        arrival_s,
        _checked(path, row, "input_length", columns["input_length"], 1),
        _checked(path, row, "output_length", columns["output_length"], 0),
    )
    try:
        raw = np.array(ids, np.int64)
    except OverflowError:
        raise TraceError(f"{path}: `hash_ids` holds a number beyond 64 bits") from None
    return Columns(
        arrival_s=plain.arrival_s,
        input_tokens=plain.input_tokens,
        output_tokens=plain.output_tokens,
        max_output_tokens=None,
        session=plain.session,
        priority=plain.priority,
        block_start=np.array(start, np.int64),
        blocks=_hashed(raw, path.stem),
        block_tokens=MOONCAKE_BLOCK_TOKENS,
    )


# --- CSV: Azure, BurstGPT ---------------------------------------------------------------------

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens", None)
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens", "Session ID")


def _seconds(text: str) -> float:
    """Return a clock time or a plain number as seconds."""
    try:
        return float(text)
    except ValueError:
        at = datetime.fromisoformat(text.strip())
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _read_csv(path: Path) -> Columns:
    times: list[float] = []
    lengths: tuple[list[str], list[str]] = ([], [])
    sessions: list[str] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader)]
            layout = next((f for f in (_AZURE, _BURSTGPT) if set(f[:3]) <= set(header)), None)
            if layout is None:
                raise TraceError(
                    f"{path}, line 1: not a trace that is known here; give Parquet with arrival_s, "
                    "input_tokens and output_tokens, a Mooncake JSONL, or a CSV with the columns "
                    f"{', '.join(_AZURE[:3])} (Azure) or {', '.join(_BURSTGPT[:3])} (BurstGPT)"
                )
            at, *both = (header.index(name) for name in layout[:3])
            session_at = header.index(layout[3]) if layout[3] in header else None
            for record in reader:
                if not record:
                    continue
                number = reader.line_num
                if len(record) != len(header):
                    raise TraceError(
                        f"{path}, line {number}: has {len(record)} fields, "
                        f"the header has {len(header)}"
                    )
                try:
                    times.append(_seconds(record[at]))
                except ValueError:
                    _refuse(
                        path, f"line {number}", layout[0], f"is {record[at]!r}; it must be a time"
                    )
                lines.append(number)
                lengths[0].append(record[both[0]])
                lengths[1].append(record[both[1]])
                if session_at is not None:
                    sessions.append(record[session_at])
    except UnicodeDecodeError:
        raise TraceError(f"{path}: is neither Parquet, nor JSON lines, nor CSV") from None
    except csv.Error as error:
        raise TraceError(f"{path}: broken CSV ({error})") from None
    if not lines:
        raise TraceError(f"{path}: there is a header but no request in it")

    def row(i: int) -> str:
        return f"line {lines[i]}"

    arrival_s = _in_order(path, row, layout[0], _checked(path, row, layout[0], times, 0))
    return _without_blocks(
        arrival_s,
        _checked(path, row, layout[1], lengths[0], 1),
        _checked(path, row, layout[2], lengths[1], 0),
        _hashed_names(sessions, path.stem) if sessions else None,
    )


# --- Parquet ----------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Columns:
    """The shared schema; `max_output_tokens` and `priority` are optional columns."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"{path}: broken Parquet file ({str(error).splitlines()[0]})") from error
    for field in ("arrival_s", "input_tokens", "output_tokens"):
        if field not in table.column_names:
            raise TraceError(
                f"{path}: has no column `{field}`; its columns are {', '.join(table.column_names)}"
            )
    if table.num_rows == 0:
        raise TraceError(f"{path}: has no rows; a trace has at least one request")
    metadata = cast("dict[bytes, bytes]", table.schema.metadata or {})

    def row(i: int) -> str:
        return f"row {i + 1}"

    def numbers(field: str, least: float) -> Floats:
        column = table.column(field)
        if column.null_count:
            at = column.is_null().to_pylist().index(True)
            _refuse(path, row(at), field, "is null; it must be a number")
        return _checked(path, row, field, column.to_numpy(), least)

    arrival_s = _in_order(path, row, "arrival_s", numbers("arrival_s", 0))
    if b"mooncake" in metadata.get(b"source", b"").lower():
        arrival_s = _spread_ticks(arrival_s)
    hashed = HASHED_IDS in metadata
    start, blocks = _parquet_blocks(path, table, None if hashed else path.stem)
    limits = priority = None
    if "max_output_tokens" in table.column_names:
        limits = numbers("max_output_tokens", 1).astype(np.int64)
    if "priority" in table.column_names:
        priority = numbers("priority", -(2.0**31))
    try:
        block_tokens = int(metadata.get(b"block_size_tokens") or b"0")
    except ValueError:
        raise TraceError(
            f"{path}: `block_size_tokens` in its metadata must be a whole number"
        ) from None
    if len(blocks) and block_tokens < 1:
        raise TraceError(f"{path}: has block_hashes but no `block_size_tokens` in its metadata")
    return Columns(
        arrival_s=arrival_s,
        input_tokens=numbers("input_tokens", 1).astype(np.int64),
        output_tokens=np.maximum(numbers("output_tokens", 0), 1.0).astype(np.int64),
        max_output_tokens=limits,
        session=_parquet_sessions(path, table, None if hashed else path.stem),
        priority=np.zeros(len(arrival_s)) if priority is None else priority,
        block_start=start,
        blocks=blocks,
        block_tokens=block_tokens or BLOCK_TOKENS,
    )


def _parquet_blocks(path: Path, table: Any, salt: str | None) -> tuple[Ints, Ints]:
    nothing = np.zeros(table.num_rows + 1, np.int64), np.zeros(0, np.int64)
    if "block_hashes" not in table.column_names:
        return nothing
    column = table.column("block_hashes").combine_chunks()
    if column.null_count == len(column):
        return nothing
    if not pa.types.is_list(column.type) or not pa.types.is_integer(column.type.value_type):
        raise TraceError(f"{path}: `block_hashes` must be a column of lists of whole numbers")
    counts = column.value_lengths().fill_null(0).to_numpy()
    ids = column.flatten()
    if ids.null_count:
        raise TraceError(f"{path}: `block_hashes` holds a null")
    raw = ids.to_numpy().astype(np.int64)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return start, raw if salt is None else _hashed(raw, salt)


def _parquet_sessions(path: Path, table: Any, salt: str | None) -> Ints:
    if "session_id" not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    names = cast("list[str | None]", table.column("session_id").cast(pa.string()).to_pylist())
    if salt is not None:
        return _hashed_names(names, salt)
    try:
        return np.fromiter((int(name) if name else 0 for name in names), np.int64)
    except (ValueError, OverflowError):
        raise TraceError(f"{path}: `session_id` must hold hashes (64-bit numbers)") from None
