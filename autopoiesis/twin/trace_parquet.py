"""Traces in Parquet: `arrival_s`, `input_tokens`, `output_tokens`, and what else is there."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.twin.trace_columns import (
    Columns,
    Floats,
    Ints,
    TraceError,
    checked,
    hashed,
    hashed_names,
    in_order,
    refuse,
    spread_ticks,
)

HASHED_IDS = b"hashed_ids"
"""Key in a Parquet file's metadata: session and block ids are hashes already."""


def read_parquet(path: Path) -> Columns:
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

    def numbers(field: str, least: float, *, whole: bool = False) -> Floats:
        column = table.column(field)
        if pa.types.is_temporal(column.type) or pa.types.is_boolean(column.type):
            raise TraceError(f"{path}: `{field}` holds {column.type}; it must hold numbers")
        if column.null_count:
            at = column.is_null().to_pylist().index(True)
            refuse(path, row(at), field, "is null; it must be a number")
        return checked(path, row, field, column.to_numpy(), least, whole=whole)

    arrival_s = in_order(path, row, "arrival_s", numbers("arrival_s", 0))
    if b"mooncake" in metadata.get(b"source", b"").lower():
        arrival_s = spread_ticks(arrival_s)
    hashed = HASHED_IDS in metadata
    start, blocks = _parquet_blocks(path, table, None if hashed else path.stem)
    limits = priority = None
    if "max_output_tokens" in table.column_names:
        limits = numbers("max_output_tokens", 1, whole=True).astype(np.int64)
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
        input_tokens=numbers("input_tokens", 1, whole=True).astype(np.int64),
        output_tokens=np.maximum(numbers("output_tokens", 0, whole=True), 1.0).astype(np.int64),
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
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def refuse_block(wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            at = int(np.searchsorted(start, wrong.argmax(), side="right"))
            refuse(path, f"row {at}", "block_hashes", f"holds {what}")

    refuse_block(ids.is_null().to_numpy(zero_copy_only=False), "a null")
    raw = ids.to_numpy().astype(np.int64)
    if salt is not None:
        return start, hashed(raw, salt)
    refuse_block(raw == 0, "0, which is no hash")
    return start, raw


def _parquet_sessions(path: Path, table: Any, salt: str | None) -> Ints:
    if "session_id" not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    try:
        column = table.column("session_id").cast(pa.string())
    except pa.ArrowException:
        raise TraceError(f"{path}: `session_id` must be a column of text or numbers") from None
    names = cast("list[str | None]", column.to_pylist())
    if salt is not None:
        return hashed_names(names, salt)
    try:
        return np.fromiter((int(name) if name else 0 for name in names), np.int64)
    except (ValueError, OverflowError):
        raise TraceError(f"{path}: `session_id` must hold hashes (64-bit numbers)") from None
