"""A report as one HTML file that needs nothing else: no script, no font, no address.

Whatever comes from the telemetry (names, reasons, messages) goes through `html.escape`; a policy in the
page tells the browser to run nothing and to load nothing all the same.
"""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from autopoiesis import __version__
from autopoiesis.orchestrator.report import Gain, Report, Row, moment
from autopoiesis.orchestrator.report_plots import (
    draw_allocation,
    draw_gains,
    draw_latency,
    draw_utility,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #fff; margin: 0 auto; max-width: 62rem;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 50rem; }
.quiet { color: #59636f; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 1.2rem 0; }
dl div { min-width: 7rem; }
dt { color: #59636f; font-size: .85rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
figure { margin: .6rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top;
  overflow-wrap: break-word; }
th { color: #59636f; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""

NOTHING = "\N{EN DASH}"

Column = tuple[str, Callable[[Row], str], bool]
"""Heading, what stands in a row's cell (plain text), and whether it is a number."""


def render_report(report: Report) -> str:
    """Return the page."""
    title = f"Autopoiesis: {moment(report.since_s)} to {moment(report.until_s)}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_origin(report))}</p>',
        *(f"<p>{escape(sentence)}</p>" for sentence in summary(report)),
        _tiles(report),
        _figure("Who served", "Share of the traffic of each arm.", draw_allocation(report)),
        _table(report.arms, ARM_COLUMNS),
        _figure(
            "Gain over each arm that people wrote",
            "Mean utility per request as served, minus the doubly robust estimate of what the arm alone would have "
            "earned on the same windows; 95 % intervals over blocks of windows. The uppermost is the best of them "
            "in hindsight, which nobody knew beforehand.",
            draw_gains(report),
        )
        if report.gains
        else "",
        _figure("Utility and regret", "Dotted: drift alarms.", draw_utility(report)),
        _figure("Workload and latency", "Dashed: the objective.", draw_latency(report)),
        _section("Drift", report.drift, DRIFT_COLUMNS, "No alarm."),
        _section("Synthesis", report.syntheses, SYNTHESIS_COLUMNS, "No policies were asked for."),
        _section("Gates at which candidates were decided", report.gates, GATE_COLUMNS, ""),
        _section(
            "Replicas", report.replicas, REPLICA_COLUMNS, "Nothing is known of replicas any more."
        ),
        _section("The twin against what was observed", report.twin_errors, TWIN_COLUMNS, ""),
        _section("Events, newest first", report.events, EVENT_COLUMNS, "None."),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _origin(report: Report) -> str:
    first, last = report.first_window, report.last_window
    return f"Windows {first} to {last}; made by autopoiesis {__version__} from its telemetry."


def summary(report: Report) -> list[str]:
    """Return what happened, in a few sentences."""
    totals, serving = report.totals, [arm for arm in report.arms if arm["share"] > 0]
    written = [arm for arm in serving if arm["origin"] != "human"]
    told = (
        f"{totals['requests']:,} requests in {totals['windows']:,} windows: {totals['completed']:,} completed, "
        f"{totals['shed']:,} shed, {totals['failed']:,} failed. {len(serving)} arms served, {len(written)} of them "
        f"synthesized, with {sum(arm['share'] for arm in written):.0%} of the requests."
    )
    sentences = [told]
    if best := report.best_human:
        sentences.append(
            f"Against {best.name}, the best arm that people wrote, the gain is {gain_text(best)} in utility "
            f"per request, {verdict(best)}."
        )
    cycles = report.syntheses
    if cycles:
        promoted = sum(len(cycle["promoted"] or ()) for cycle in cycles)
        sentences.append(
            f"Policies were asked for {len(cycles)} times; {sum(c['candidates'] for c in cycles)} candidates came, "
            f"{promoted} became arms. That cost {sum(c['cpu_seconds'] for c in cycles):,.0f} s of CPU, "
            f"{sum(c['tokens'] for c in cycles):,} tokens and {sum(c['cost_usd'] for c in cycles):.2f} USD."
        )
    if totals["drifted"]:
        sentences.append(f"Drift was noticed in {totals['drifted']} windows.")
    return sentences


def gain_text(gain: Gain) -> str:
    """Return a gain with its interval."""
    if gain.low is None or gain.high is None:
        return f"{gain.gain:+.4f}"
    return f"{gain.gain:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def verdict(gain: Gain) -> str:
    """Say what the interval allows to say."""
    if gain.low is None or gain.high is None:
        return "from too few windows for an interval"
    if gain.low > 0:
        return "clearly better"
    return "clearly worse" if gain.high < 0 else "not to be told from none"


def _tiles(report: Report) -> str:
    totals = report.totals
    tiles = [
        ("requests", f"{totals['requests']:,}"),
        ("requests/s within the objective", _number(totals["goodput_rps"], 2)),
        ("output tokens/s", _number(totals["throughput_tokens_s"], 0)),
        ("utility", _number(totals["utility"])),
        ("regret", _number(totals["regret"])),
        ("drift alarms", f"{totals['drifted']}"),
    ]
    if best := report.best_human:
        tiles.insert(4, ("gain over the best human arm", f"{best.gain:+.4f}"))
    told = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in tiles)
    return f"<dl>{told}</dl>"


def _figure(title: str, caption: str, svg: str) -> str:
    return (
        f'<h2>{escape(title)}</h2>\n<p class="quiet">{escape(caption)}</p>\n'
        f'<figure role="img" aria-label="{escape(title)}">{svg}</figure>'
    )


def _section(title: str, rows: Sequence[Row], columns: Iterable[Column], nothing: str) -> str:
    if not rows and not nothing:
        return ""
    body = _table(rows, columns) if rows else f'<p class="quiet">{escape(nothing)}</p>'
    return f"<h2>{escape(title)}</h2>\n{body}"


def _table(rows: Sequence[Row], columns: Iterable[Column]) -> str:
    columns = tuple(columns)

    def cell(tag: str, text: str, is_number: bool) -> str:
        kind = ' class="number"' if is_number else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, is_number) for name, _, is_number in columns)
    body = "\n".join(
        "<tr>"
        + "".join(cell("td", text(row), is_number) for _, text, is_number in columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _number(value: float | None, digits: int = 4) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _text(name: str) -> Column:
    return name.replace("_", " "), lambda row: _plain(row[name]), False


def _time(name: str, column: str) -> Column:
    return name, lambda row: str(row[column])[:19].replace("T", " "), False


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _numeric(name: str, column: str, digits: int = 4) -> Column:
    return name, lambda row: _number(row[column], digits), True


def _share(name: str, column: str) -> Column:
    return name, lambda row: NOTHING if row[column] is None else f"{row[column]:.1%}", True


ARM_COLUMNS: tuple[Column, ...] = (
    _text("name"), _text("origin"), _text("state"), _numeric("windows", "windows", 0),
    _numeric("requests", "requests", 0), _share("share", "share"), _numeric("utility", "utility"),
    _numeric("estimate, had it served all", "estimate"), _text("reason"),
)  # fmt: skip
DRIFT_COLUMNS: tuple[Column, ...] = (
    _numeric("window", "window_id", 0), _time("at (UTC)", "started_at"), _text("drift"),
)  # fmt: skip
SYNTHESIS_COLUMNS: tuple[Column, ...] = (
    _time("at (UTC)", "started_at"), _text("trigger"), _text("synthesizer"), _numeric("candidates", "candidates", 0),
    _text("promoted"), _numeric("CPU s", "cpu_seconds", 1), _numeric("tokens", "tokens", 0),
    _numeric("USD", "cost_usd", 3), _text("conclusion"), _text("error"),
)  # fmt: skip
GATE_COLUMNS: tuple[Column, ...] = (
    _text("gate"), _numeric("candidates", "candidates", 0), _numeric("best gain", "best_gain"),
)  # fmt: skip
REPLICA_COLUMNS: tuple[Column, ...] = (
    _text("replica"), _numeric("requests", "requests", 0), _numeric("failed", "failed", 0),
    _numeric("TTFT median [s]", "ttft_p50_s", 3), _share("healthy", "healthy"), _numeric("running", "running", 1),
    _numeric("waiting", "waiting", 1), _share("KV cache", "kv_usage"), _share("at most", "kv_usage_max"),
    _share("prefix hits", "hit_rate"),
)  # fmt: skip
TWIN_COLUMNS: tuple[Column, ...] = (
    _text("metric"), _numeric("windows", "windows", 0), _numeric("observed", "observed"), _numeric("bias", "bias"),
    _numeric("mean error", "mean_error"),
)  # fmt: skip
EVENT_COLUMNS: tuple[Column, ...] = (
    _time("at (UTC)", "happened_at"), _text("kind"), _text("subject"), _text("message"),
)  # fmt: skip
