"""Answers to queries: plain values, and the three ways to show them."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import orjson
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

JSONValue = Any
"""None, bool, int, float, str, or lists and dicts of them."""

MAX_ELEMENTS = 1_000_000
"""Characters of a text or elements of a list in one value."""
INTEGERS = range(-(2**63), 2**64)
"""What a JSON integer may be here; a HUGEINT beyond becomes a float."""


LEAST_COLUMN = 11
"""Characters per column below which a table is no longer readable."""


class TooLargeError(ValueError):
    """A value is too large to hand out: one sentence."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The answer to one query."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    """DuckDB's names of the columns' types."""
    rows: list[list[JSONValue]]
    """Plain JSON values: times as ISO 8601 in UTC, NaN and infinity as None, bytes as hex."""
    truncated: bool
    """True: there were more rows than asked for."""
    seconds: float


def as_json(value: object) -> JSONValue:
    """Return a value of DuckDB's as a plain JSON value.

    Raises:
        TooLargeError: a text or list of more than `MAX_ELEMENTS`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if value in INTEGERS else float(value)
    if isinstance(value, (str, bytes, bytearray, list, tuple, dict)) and len(value) > MAX_ELEMENTS:
        raise TooLargeError(
            f"A value of {len(value):,} elements is too large to hand out; aggregate it, or take a part."
        )
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    return str(value)


def format_result(result: QueryResult, form: str) -> RenderableType:
    """Return the answer as a rich table, as JSON text (a list of objects) or as CSV text.

    A table too wide for the console shows one row below the other.

    Raises:
        ValueError: another form was asked for.
    """
    if form == "table":
        return _AnswerTable(result)
    names = _distinct(result.columns)
    if form == "json":
        objects = [dict(zip(names, row, strict=True)) for row in result.rows]
        return orjson.dumps(objects, option=orjson.OPT_INDENT_2).decode()
    if form == "csv":
        return _csv(names, result.rows)
    raise ValueError(f"There is no format {form!r}; use table, json or csv.")


def _distinct(columns: Sequence[str]) -> list[str]:
    """Number columns of the same name (a, a:1, a:2), so that none hides another."""
    names: list[str] = []
    for column in columns:
        name, number = column, 0
        while name in names:
            number += 1
            name = f"{column}:{number}"
        names.append(name)
    return names


class _AnswerTable:
    """A table across, or where the console is too narrow for it, one block of lines per row."""

    def __init__(self, result: QueryResult) -> None:
        self._result = result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        across = self._across()
        fits = console.measure(across, options=options.update(max_width=10_000)).maximum
        roomy = options.max_width >= min(fits, LEAST_COLUMN * len(self._result.columns))
        yield across if roomy or not self._result.rows else self._below()
        if self._result.truncated:
            yield Text(f"There are more than these {len(self._result.rows)} rows.", style="yellow")

    def _across(self) -> Table:
        table = Table(header_style="bold")
        for i, name in enumerate(self._result.columns):
            numbers = all(_is_number(row[i]) for row in self._result.rows if row[i] is not None)
            table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
        for row in self._result.rows:
            table.add_row(*(Text(_short(value)) for value in row))
        return table

    def _below(self) -> Table:
        table = Table(show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for row in self._result.rows:
            for name, value in zip(self._result.columns, row, strict=True):
                table.add_row(Text(name), Text(_short(value)))
            table.add_section()
        return table


def _is_number(value: JSONValue) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: JSONValue) -> str:
    """Return a value for people's eyes: floats to six digits, lists and maps in one line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items())
    return str(value)


def _csv(names: Sequence[str], rows: Sequence[Sequence[JSONValue]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(
            [orjson.dumps(x).decode() if isinstance(x, (list, dict)) else x for x in row]
        )
    return out.getvalue()
