"""Reads the trace formats in use: every file becomes the same columns or one error."""

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from autopoiesis.twin.trace_columns import (
    Columns,
    TraceError,
    checked,
    hashed,
    hashed_names,
    in_order,
    refuse,
    spread_ticks,
    without_blocks,
)
from autopoiesis.twin.trace_parquet import read_parquet

MOONCAKE_BLOCK_TOKENS = 512


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
        return read_parquet(path)
    if head.lstrip().startswith(b"{"):
        return _read_mooncake(path)
    return _read_csv(path)


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
                refuse(path, f"line {number}", field, f"is {value!r}; it must be a number")
            values.append(value)
        hashes = record.get("hash_ids") or []
        if type(hashes) is not list or any(type(h) is not int for h in cast("list[Any]", hashes)):
            refuse(path, f"line {number}", "hash_ids", "must be a list of whole numbers")
        if any(not -(1 << 63) <= h < 1 << 63 for h in cast("list[int]", hashes)):
            refuse(path, f"line {number}", "hash_ids", "has a number beyond 64 bits")
        ids.extend(cast("list[int]", hashes))
        start.append(len(ids))
    if not lines:
        raise TraceError(f"{path}: the file is empty; a trace has at least one request")

    def row(i: int) -> str:
        return f"line {lines[i]}"

    timestamp = checked(path, row, "timestamp", columns["timestamp"], 0)
    arrival_s = spread_ticks(in_order(path, row, "timestamp", timestamp) / 1000.0)
    plain = without_blocks(
        arrival_s,
        checked(path, row, "input_length", columns["input_length"], 1, whole=True),
        checked(path, row, "output_length", columns["output_length"], 0, whole=True),
    )
    return Columns(
        arrival_s=plain.arrival_s,
        input_tokens=plain.input_tokens,
        output_tokens=plain.output_tokens,
        max_output_tokens=None,
        session=plain.session,
        priority=plain.priority,
        block_start=np.array(start, np.int64),
        blocks=hashed(np.array(ids, np.int64), path.stem),
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
                    refuse(
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

    arrival_s = in_order(path, row, layout[0], checked(path, row, layout[0], times, 0))
    return without_blocks(
        arrival_s,
        checked(path, row, layout[1], lengths[0], 1, whole=True),
        checked(path, row, layout[2], lengths[1], 0, whole=True),
        hashed_names(sessions, path.stem) if sessions else None,
    )
