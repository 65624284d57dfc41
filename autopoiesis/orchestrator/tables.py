"""What the command line prints: tables for people, JSON for programs."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from autopoiesis.orchestrator.doctor import Finding


class Describable(Protocol):
    """Something that can be told as a mapping."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        ...


def write_json(value: object, target: str) -> None:
    """Write JSON to a file, or to standard output for `-`; NaN becomes null."""
    data = orjson.dumps(
        value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    )
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        Path(target).write_bytes(data)


def number(value: Any, digits: int = 3) -> str:
    """Format a number for a table; missing ones as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def arms_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the registry."""
    table = Table(title=f"{len(rows)} arms")
    for column in ("id", "name", "origin", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("traffic", justify="right")
    table.add_column("utility", justify="right")
    table.add_column("why", no_wrap=True, overflow="ellipsis")
    for row in rows:
        share, utility = number(row["traffic_share"], 2), number(row["utility"])
        table.add_row(
            row["id"], row["name"], row["origin"], row["state"], share, utility, row["reason"]
        )
    return table


def arm_panel(row: Mapping[str, Any]) -> RenderableType:
    """Show one arm with its policy."""
    facts = {k: v for k, v in row.items() if k != "source"}
    return Group(
        pairs_table(str(row["name"]), facts), Panel(Syntax(row["source"], "python"), title="policy")
    )


def pairs_table(title: str, pairs: Mapping[str, Any]) -> Table:
    """Show names and values."""
    table = Table(title=title, show_header=False)
    for name, value in pairs.items():
        shown = (
            number(value)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else str(value)
        )
        table.add_row(name, shown)
    return table


def load_table(summary: Describable) -> Table:
    """Show what a load run measured."""
    return pairs_table("load", summary.as_dict())


def replay_table(report: Describable) -> Table:
    """Show a replay, best policy first."""
    told = report.as_dict()
    title = f"{told['trace']}: {told['requests']:,} requests over {told['duration_s']:,.0f} s, "
    title += (
        f"{told['replicas']} replicas, {told['simulated_requests_per_s']:,.0f} simulated requests/s"
    )
    table = Table(title=title)
    columns = {"utility": 4, "goodput": 2, "completed": 0, "shed": 0, "failed": 0, "ttft_p50_s": 3, "ttft_p99_s": 3,
               "tpot_p50_s": 4, "tpot_p99_s": 4, "e2e_mean_s": 2}  # fmt: skip
    table.add_column("policy")
    table.add_column("kind")
    for column in columns:
        table.add_column(column, justify="right")
    for row in sorted(told["results"], key=lambda r: -(r["utility"] or 0.0)):
        mark = " *" if row["policy"] == told["best_human"] else ""
        table.add_row(
            row["policy"] + mark, row["kind"], *(number(row[c], d) for c, d in columns.items())
        )
    table.caption = "* best human arm"
    return table


def doctor_table(findings: Sequence[Finding]) -> Table:
    """Show what was looked for."""
    table = Table(title="this machine")
    for column in ("", "what", "found", "how to get it"):
        table.add_column(column)
    for finding in findings:
        sign = (
            "[green]ok[/]"
            if finding.there
            else ("[red]missing[/]" if finding.needed else "[yellow]absent[/]")
        )
        table.add_row(sign, finding.what, finding.detail, "" if finding.there else finding.remedy)
    return table
