"""What a suite came to, for people: one content, as Markdown and as one HTML file."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.table

from autopoiesis.atomic import write_atomically
from autopoiesis.evaluation.parts import Part
from autopoiesis.evaluation.plots import draw, lines
from autopoiesis.evaluation.summary import Results, adaptations, regret

PLOTS = "plots"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a heading."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot, by the name of its file."""

    file: str


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's title."""

    text: str


Block = str | Table | Picture | Heading
"""A paragraph, or something else."""


def gains_table(summary: dict[str, Any]) -> rich.table.Table:
    """Show the gains by scenario and over all, for a terminal: a row per rival, since there are many."""
    table = rich.table.Table(
        title=f"{summary['suite']}: reduction of {_cost_in_words(summary['cost'])} by {summary['ours']}, "
        f"{summary['seeds']} seeds"
    )
    table.add_column("scenario")
    table.add_column("against")
    table.add_column("reduction", justify="right")
    rivals = [c["against"] for c in summary["comparisons"]]
    for told in summary["scenarios"]:
        gains = {
            r: _with_interval(*told["gains"][r].values()) for r in rivals if r in told["gains"]
        }
        _add_rows(table, told["name"], gains)
    mean = {
        c["against"]: _with_interval(c["mean_gain"], c["gain_low"], c["gain_high"])
        for c in summary["comparisons"]
    }
    _add_rows(table, "mean", mean)
    return table


def _add_rows(table: rich.table.Table, name: str, gains: Mapping[str, str]) -> None:
    for i, (rival, gain) in enumerate(gains.items()):
        table.add_row("" if i else name, rival, gain)
    table.add_section()


def _with_interval(gain: float | None, low: float | None, high: float | None) -> str:
    return f"{percent(gain)} {_interval(low, high)}".strip()


def write_reports(results: Results, summary: dict[str, Any], out: Path) -> None:
    """Write `report.md`, `report.html` and the plots into `out`."""
    pictures = draw(results, summary, out / PLOTS)
    blocks = _blocks(results, summary, pictures)
    title = f"Evaluation: {results.suite}"
    write_atomically(out / "report.md", _markdown(title, blocks).encode())
    write_atomically(out / "report.html", _html(title, blocks, out / PLOTS).encode())


def _blocks(results: Results, summary: dict[str, Any], pictures: Sequence[str]) -> list[Block]:
    machine = summary.get("machine", {})
    blocks: list[Block] = [
        (
            f"Command: `{summary.get('command', 'autopoiesis bench ' + results.suite)}`. "
            f"{summary['seeds']} seeds, {len(results.scenarios)} scenarios, {len(results.contestants)} contestants. "
            f"Machine: {machine.get('cpu', '?')}, {machine.get('cores', '?')} cores; "
            f"autopoiesis {machine.get('autopoiesis', '?')}, Python {machine.get('python', '?')}."
        ),
        Heading("Gains"),
        (
            f"Reduction of {_cost_in_words(results.cost)} by *{summary['ours']}*, paired by seed, mean over "
            f"{len(summary['scenarios_with_room'])} scenarios with something to gain, with bootstrap intervals of "
            f"{summary['confidence']:.0%} over seeds. A rival group is represented by its best in hindsight, chosen "
            "per scenario and seed."
        ),
        Table(
            ("against", "gain", "interval"),
            tuple(
                (c["against"], percent(c["mean_gain"]), _interval(c["gain_low"], c["gain_high"]))
                for c in summary["comparisons"]
            ),
        ),
        Picture("gains.svg"),
        Picture("costs.svg"),
    ]
    blocks += _evolution(summary)
    for i, told in enumerate(summary["scenarios"]):
        blocks += [Heading(told["name"]), *_scenario(results, told)]
        if f"windows-{i}.svg" in pictures:
            blocks.append(Picture(f"windows-{i}.svg"))
    return blocks


def _evolution(summary: dict[str, Any]) -> list[Block]:
    said = [
        (
            f"Policies promoted while serving: {summary['promoted']}, harmful in hindsight: "
            f"{summary['harmful']} ({percent(summary['harmful_share'])}); of the {summary['live']} that got past the "
            f"canary {summary['harmful_live']} ({percent(summary['harmful_live_share'])}). Thinking took "
            f"{number(summary['evolution_cpu_s_per_run'], 1)} s of CPU a run; "
            f"{summary['evolution_tokens']} tokens and {summary['evolution_usd']:.2f} USD of language models in all."
        )
    ]
    if summary.get("shifts"):
        said.append(
            f"Shifts: {summary['shifts']}; as good as the best human arm there after a median of "
            f"{number(summary['adaptation_p50_s'], 0)} s (p90 {number(summary['adaptation_p90_s'], 0)} s) in "
            f"{summary['adapted']} of them."
        )
    return list(said)


def _scenario(results: Results, told: dict[str, Any]) -> list[Block]:
    name = told["name"]
    said = (
        f"Best human arm per seed: {', '.join(dict.fromkeys(told['best_human']))}. Gain over it "
        f"{percent(told['gain'])} {_interval(told['gain_low'], told['gain_high'])}."
    )
    columns = REQUEST_COLUMNS if results.cost == "misses" else TIME_COLUMNS
    rows = [
        (contestant, *(show(parts) for show in columns.values()))
        for contestant, parts in lines(results, name).items()
    ]
    every = [
        (contestant, *(show(results.of(name, contestant)) for show in columns.values()))
        for contestant in results.contestants
        if "/" in contestant
    ]
    blocks: list[Block] = [said, Table(("contestant", *columns), tuple(rows))]
    if results.cost == "misses":
        extra = [
            (
                contestant,
                number(regret(results, name, contestant), 4),
                ", ".join(
                    "never" if t is None else f"{t:.0f}"
                    for t in adaptations(results, name, contestant)
                )
                or "-",
            )
            for contestant in results.contestants
            if "/" not in contestant
        ]
        blocks.append(Table(("contestant", "regret", "adaptation [s], by shift"), tuple(extra)))
    blocks.append(Table(("fixed arm", *columns), tuple(every)))
    return blocks


Show = Callable[[Sequence[Part]], str]


def _mean(column: str, digits: int) -> Show:
    def show(parts: Sequence[Part]) -> str:
        values = [p.row[column] for p in parts if p.row.get(column) is not None]
        return number(float(np.mean(values)) if values else None, digits)

    return show


REQUEST_COLUMNS: dict[str, Show] = {
    "misses": lambda parts: percent(float(np.mean([p.row["miss_share"] for p in parts]))),
    "goodput [1/s]": _mean("goodput_rps", 2),
    "utility": _mean("utility", 3),
    "TTFT p50 [s]": _mean("ttft_p50_s", 2),
    "TTFT p99 [s]": _mean("ttft_p99_s", 2),
    "TPOT p50 [s]": _mean("tpot_p50_s", 3),
    "TPOT p99 [s]": _mean("tpot_p99_s", 3),
    "E2E mean [s]": _mean("e2e_mean_s", 1),
    "shed": _mean("shed", 0),
    "failed": _mean("failed", 0),
    "tokens/s": _mean("throughput_tokens_s", 0),
    "replica-s": _mean("replica_seconds", 0),
    "CPU [s]": _mean("evolution_cpu_s", 1),
}
TIME_COLUMNS: dict[str, Show] = {
    "total [s]": _mean("total_s", 1),
    "scheduling [s]": _mean("scheduling_s", 3),
    "stale [s]": _mean("stale_s", 2),
    "reconfiguration [s]": _mean("reconfiguration_s", 1),
    "serving [s]": _mean("serving_s", 1),
    "reschedulings": _mean("reschedulings", 1),
    "GPU-s": _mean("gpu_seconds", 0),
    "CPU [s]": _mean("evolution_cpu_s", 1),
}


def _cost_in_words(cost: str) -> str:
    return {"misses": "requests that miss an objective", "total_s": "total time"}.get(cost, cost)


def number(value: float | None, digits: int) -> str:
    """Format a figure; a dash for what is not known."""
    return "-" if value is None or not np.isfinite(value) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """Format a share."""
    return "-" if share is None or not np.isfinite(share) else f"{100 * share:.1f} %"


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or not np.isfinite(low + high):
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    return "\n\n".join([f"# {title}", *map(_as_markdown, blocks)]) + "\n"


def _as_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Picture(file):
            return f"![{file}]({PLOTS}/{file})"
        case Table(head, rows):
            rule = "|".join("---" for _ in head)
            return "\n".join([_line(head), f"|{rule}|", *map(_line, rows)])
        case _:
            return block


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:13px;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def _html(title: str, blocks: Sequence[Block], plots: Path) -> str:
    body = "\n".join(_as_html(block, plots) for block in blocks)
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style><h1>{name}</h1>\n{body}\n</html>\n"
    )


def _as_html(block: Block, plots: Path) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Picture(file):
            text = (plots / file).read_text("utf-8")
            return text[text.index("<svg") :]
        case Table(head, rows):
            first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            others = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            return f"<table><tr>{first}</tr>{others}</table>"
        case _:
            return f"<p>{html.escape(block).replace('`', '').replace('*', '')}</p>"
