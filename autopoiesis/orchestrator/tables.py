"""What the command line prints: tables for people, JSON for programs."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from autopoiesis.orchestrator.doctor import Finding
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.twin.calibration import Calibration
from autopoiesis.twin.speed import FEW, MANY, SpeedReport
from autopoiesis.twin.validation import Validation

SHOWN = 12
"""Rows of a table of candidates."""


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


def fleet_table(replicas: Sequence[Mapping[str, Any]]) -> Table:
    """Show what each replica does, and may do at once."""
    table = Table(title="the fleet", box=SIMPLE_HEAD)
    for column in ("replica", "kind", "address", "standing"):
        table.add_column(column)
    for column in ("max seqs", "max tokens a step"):
        table.add_column(column, justify="right")
    table.add_column("still to do, or why it failed")
    for one in replicas:
        limits = number(one["max_num_seqs"]), number(one["max_num_batched_tokens"])
        names = (str(one[name]) for name in ("replica", "kind", "address", "standing"))
        table.add_row(*names, *limits, escape(one["ordered"] or one["error"]))
    return table


def speed_table(report: SpeedReport) -> Table:
    """Show how fast the twin is [simulated requests per CPU second]."""
    table = Table(
        title=f"{report.trace}: {report.requests:,} requests, {report.profile}, "
        f"{report.load_rps_per_replica:.1f} requests/s per replica"
    )
    table.add_column("policy", no_wrap=True)
    for column in (
        f"{FEW} replicas [1/s]", f"{MANY} replicas [1/s]", "cost ratio", f"Python, {FEW} replicas [1/s]",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for p in report.policies:
        table.add_row(
            p.policy,
            number(p.compiled_rps, 0),
            number(p.compiled_64_rps, 0),
            number(p.cost_ratio_64_to_8, 2),
            number(p.python_rps, 0),
        )
    return table


def arms_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the registry."""
    table = Table(
        title=f"{len(rows)} arms",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        expand=True,
    )
    for column in ("id", "name", "kind", "origin", "state", "traffic", "utility"):
        side = "right" if column in {"traffic", "utility"} else "left"
        table.add_column(column, justify=side, no_wrap=True)
    # A narrow terminal shortens the reason first: reduced alike, the other columns would vanish.
    table.add_column("why", ratio=1, no_wrap=True)
    for row in rows:
        share, utility = number(row["traffic_share"], 2), number(row["utility"])
        told = [escape(row[column]) for column in ("id", "name", "kind", "origin", "state")]
        table.add_row(*told, share, utility, escape(row["reason"]))
    return table


def arm_panel(row: Mapping[str, Any]) -> RenderableType:
    """Show one arm with its policies, what its author was asked and answered, its races and its history."""
    texts = {"source": "policy", "slow": "slow functions", "prompt": "asked", "answer": "answered"}
    facts = {k: v for k, v in row.items() if k not in {*texts, "history", "races"}}
    parts: list[RenderableType] = [pairs_table(str(row["name"]), facts)]
    for key, title in texts.items():
        if row[key]:
            code = key in {"source", "slow"}
            shown = Syntax(row[key], "python", word_wrap=True) if code else Text(row[key])
            parts.append(Panel(shown, title=title))
    if row["races"]:
        races = ("synthesis", "at", "trigger", "synthesizer", "verdict", "gate", "gain", "reason")
        parts.append(_rows_table("races", row["races"], races))
    parts.append(_rows_table("history", row["history"], ("at", "state", "pinned", "reason")))
    return Group(*parts)


def diff_view(compared: Mapping[str, Any]) -> RenderableType:
    """Show the scores of two arms side by side, and what differs in their sources."""
    a, b = compared["a"], compared["b"]
    table = Table(show_header=False)
    for name in a:
        table.add_row(name, *(_shown(side[name]) for side in (a, b)))
    same = "The sources do not differ."
    return Group(table, Syntax(compared["diff"].rstrip(), "diff", theme="ansi_dark", background_color="default")
                 if compared["diff"] else same)  # fmt: skip


def lineage_tree(family: Mapping[str, Any]) -> RenderableType:
    """Show an arm between its ancestors and its descendants."""
    name = _relative(family)
    trees: list[RenderableType] = []
    for title, key in (("comes from", "ancestors"), ("became", "descendants")):
        tree = Tree(f"{name} [dim]{title}[/]")
        _branch(tree, family[key], key)
        if not family[key]:
            tree.add("nobody" if key == "ancestors" else "nothing yet")
        trees.append(tree)
    return Group(*trees)


def _branch(tree: Tree, relatives: Sequence[Mapping[str, Any]], key: str) -> None:
    for relative in relatives:
        branch = tree.add(_relative(relative))
        _branch(branch, relative.get(key, ()), key)


def _relative(row: Mapping[str, Any]) -> str:
    known = [str(row[part]) for part in ("origin", "state") if row[part]]
    if row["gain"] is not None:
        known.append(
            f"gain {row['gain']:+.3f} [{number(row['gain_low'])}, {number(row['gain_high'])}]"
        )
    if row.get("repeated"):
        known.append("see above")
    name = row["name"] if row["name"] == row["id"] else f"{row['name']} ({row['id']})"
    return f"{escape(name)}  [dim]{escape(', '.join(known))}[/]"


def import_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what came of each file."""
    return _rows_table(f"{len(rows)} files", rows, ("file", "verdict", "id", "name", "why"))


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[column]) for column in columns))
    return table


def pairs_table(title: str, pairs: Mapping[str, Any]) -> Table:
    """Show names and values."""
    table = Table(title=title, show_header=False)
    for name, value in pairs.items():
        table.add_row(name, _shown(value))
    return table


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return number(value)
    return escape(str(value))


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


def counterfactual_table(report: Describable) -> Table:
    """Show what each arm would have earned on stored windows, best first."""
    told = report.as_dict()
    table = Table(
        title=f"windows {told['first_window']} to {told['last_window']}: {told['requests']:,} requests "
        f"in {told['windows']} windows earned {number(told['observed_utility'])}"
    )
    table.add_column("policy")
    for column in ("utility", "at 95 %", "twin alone", "played", "gain", "gain at 95 %"):
        table.add_column(column, justify="right")
    for row in told["arms"]:
        table.add_row(
            escape(row["policy"]),
            number(row["utility"]),
            f"{number(row['low'])} to {number(row['high'])}",
            number(row["twin"]),
            f"{row['windows_played']}",
            f"{row['gain']:+.3f}",
            f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f}",
        )
    table.caption = "utility had the arm served all of it; gain over what was really earned"
    return table


def calibration_table(calibration: Calibration) -> Table:
    """Show the coefficients before and after, with their intervals."""
    table = Table(
        title=f"{calibration.requests:,} requests: mean error of a time "
        f"{math.expm1(calibration.error_before):.0%} before, {math.expm1(calibration.error):.0%} now"
    )
    table.add_column("coefficient")
    for column in ("before", "now", "90 % interval"):
        table.add_column(column, justify="right")
    for c in calibration.coefficients:
        low, high = _microseconds(c.low), _microseconds(c.high)
        table.add_row(c.name, _microseconds(c.before), _microseconds(c.value), f"{low} to {high}")
    speeds = [f"{name} {speed:.2f}" for name, speed in calibration.speeds.items()]
    table.caption = "microseconds; relative speeds: " + ", ".join(speeds)
    return table


def validation_table(validation: Validation) -> Table:
    """Show the twin's errors."""
    table = Table(title=f"{validation.requests:,} requests not fitted to ({validation.profile})")
    for column in ("measure", "statistic"):
        table.add_column(column)
    for column in ("observed", "twin", "error", "90 % interval"):
        table.add_column(column, justify="right")
    for c in validation.comparisons:
        interval = "-" if c.low == c.high else f"{c.low:+.1%} to {c.high:+.1%}"
        table.add_row(
            c.measure,
            c.statistic,
            number(c.observed, 4),
            number(c.twin, 4),
            f"{c.error:+.1%}",
            interval,
        )
    told = [f"{measure} {error:.1%}" for measure, error in validation.median_error.items()]
    table.caption = "median error of a single request: " + ", ".join(told)
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.4g}"


def synthesis_table(row: SynthesisRow, kept: str) -> RenderableType:
    """Show a cycle: the candidates that came farthest, and what came of it all."""
    bill = f", {row.tokens:,} tokens, ${row.cost_usd:.4f}" if row.tokens else ""
    table = Table(
        title=f"{row.synthesizer}: {len(row.candidates)} candidates in {row.seconds:.1f} s "
        f"({row.cpu_seconds:.1f} s CPU){bill}",
        expand=True,
    )
    for column, width in (("policy", 12), ("gate", 8), ("gain", 26)):
        table.add_column(column, no_wrap=True, width=width)
    table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    farthest = sorted(row.candidates, key=_progress, reverse=True)
    for c in farthest[:SHOWN]:
        gain = "-" if c.gain is None else f"{c.gain:+.4f}"
        if c.gain_low is not None and c.gain_high is not None:
            gain += f" [{c.gain_low:+.4f}, {c.gain_high:+.4f}]"
        table.add_row(c.arm_id or "-", c.gate, escape(gain), escape(c.reason))
    more = len(farthest) - SHOWN
    left_out = [f"{more} more are not shown."] if more > 0 else []
    return Group(table, Text("\n".join([*left_out, row.error or row.conclusion, kept])))


def _progress(candidate: CandidateRow) -> tuple[int, float]:
    gates = ("verify", "novelty", "screen", "race", "holdout", "tuning", "promoted", "tuned")
    gain = candidate.gain if candidate.gain is not None else -math.inf
    return (gates.index(candidate.gate) if candidate.gate in gates else -1, gain)


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
