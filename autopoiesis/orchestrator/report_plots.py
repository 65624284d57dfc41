"""The plots of a report, as SVG that stands in a page: no script, no font, nothing from elsewhere."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from autopoiesis.orchestrator.report import Report

HUMAN = ("#1f5fa8", "#3f9bb5", "#7a8fd0", "#2b7a6b", "#9ab4c9", "#51638c")
SYNTHESIZED = ("#c2571a", "#d99a2b", "#a8324a", "#e2725b", "#8c5a2b", "#c97fa0")
OTHERS = "#b9b9b9"
MOST_NAMED = 8
"""Arms with an area of their own; the rest are one."""
LONGEST_NAME = 32
LEAST_REACH = 0.005
"""Gains are never drawn larger than on this scale: what is nothing looks like nothing."""


def shown(name: str) -> str:
    """Return a name that is safe to draw: printable, and not too long."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return printable if len(printable) <= LONGEST_NAME else f"{printable[: LONGEST_NAME - 1]}…"


def colours(arms: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Give each arm a colour: cool ones to people's, warm ones to synthesized arms."""
    given: dict[str, str] = {}
    for palette, are_human in ((HUMAN, True), (SYNTHESIZED, False)):
        mine = [arm["id"] for arm in arms if (arm["origin"] == "human") is are_human]
        given |= {arm_id: palette[i % len(palette)] for i, arm_id in enumerate(mine)}
    return given


def draw_allocation(report: Report) -> str:
    """Draw each arm's share of the traffic over time."""
    colour, names = colours(report.arms), {arm["id"]: shown(arm["name"]) for arm in report.arms}
    order = sorted(report.shares, key=lambda arm: -sum(report.shares[arm]))
    named, rest = order[:MOST_NAMED], order[MOST_NAMED:]
    areas = [np.array(report.shares[arm]) for arm in named]
    labels = [names.get(arm, arm[:6]) for arm in named]
    paints = [colour.get(arm, OTHERS) for arm in named]
    if rest:
        areas.append(np.sum([report.shares[arm] for arm in rest], axis=0))
        labels.append(f"{len(rest)} others")
        paints.append(OTHERS)
    figure, (axes,) = _over_time(1, 3.0)
    if areas:
        axes.stackplot(_times(report), np.array(areas), colors=paints, linewidth=0)
        _legend(axes, [_patch(paint) for paint in paints], labels)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    return _svg(figure, "allocation")


def draw_utility(report: Report) -> str:
    """Draw utility, and below it regret with its interval; dotted lines are drift alarms."""
    figure, (above, below) = _over_time(2, 4.2)
    times = _times(report)
    above.plot(times, _floats(report.course["utility"]), color=HUMAN[0], linewidth=1.2)
    above.set_ylabel("utility")
    above.set_ylim(top=1.02)
    regret, low, high = (
        _floats(report.course[name]) for name in ("regret", "regret_low", "regret_high")
    )
    below.fill_between(times, low, high, color=SYNTHESIZED[2], alpha=0.18, linewidth=0)
    below.plot(times, regret, color=SYNTHESIZED[2], linewidth=1.2)
    below.set_ylabel("regret")
    below.set_ylim(bottom=0)
    for at, drifted in zip(times, report.course["drifted"], strict=True):
        if drifted:
            above.axvline(at, color="#777", linewidth=0.8, linestyle=":")
    return _svg(figure, "utility")


def draw_latency(report: Report) -> str:
    """Draw requests a second, and latencies against the objective."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    figure, (rate, ttft, tpot) = _over_time(3, 6.0)
    times = _times(report)
    rate.plot(times, _floats(report.course["requests_rps"]), color=OTHERS, linewidth=1.2)
    rate.plot(times, _floats(report.course["goodput_rps"]), color=HUMAN[0], linewidth=1.2)
    rate.set_ylabel("requests/s")
    rate.set_ylim(bottom=0)
    _legend(rate, [_patch(OTHERS), _patch(HUMAN[0])], ["all", "within the objective"])
    for axes, name in ((ttft, "ttft"), (tpot, "tpot")):
        axes.plot(times, _floats(report.course[f"{name}_p50_s"]), color=HUMAN[0], linewidth=1.2)
        axes.plot(times, _floats(report.course[f"{name}_p99_s"]), color=HUMAN[2], linewidth=1.0)
        if limit := report.objective.get(f"slo_{name}_s"):
            axes.axhline(limit, color="#777", linewidth=0.9, linestyle="--")
        axes.set_ylabel(f"{name.upper()} [s]")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        _legend(axes, [_patch(HUMAN[0]), _patch(HUMAN[2])], ["median", "99th percentile"])
    return _svg(figure, "latency")


def draw_gains(report: Report) -> str:
    """Draw the gain over each human arm with its interval."""
    gains = report.gains[:12]
    figure, (axes,) = _figure(1, 0.8 + 0.32 * max(len(gains), 1))
    places = np.arange(len(gains))[::-1]
    for place, gain in zip(places, gains, strict=True):
        paint = HUMAN[3] if gain.low is not None and gain.low > 0 else HUMAN[0]
        if gain.low is not None and gain.high is not None:
            axes.plot([gain.low, gain.high], [place, place], color=paint, linewidth=2)
        axes.plot([gain.gain], [place], "o", color=paint, markersize=5)
    axes.axvline(0, color="#777", linewidth=0.9)
    reach = max((abs(x) for g in gains for x in (g.gain, g.low, g.high) if x), default=0.0)
    axes.set_xlim(-max(1.1 * reach, LEAST_REACH), max(1.1 * reach, LEAST_REACH))
    axes.set_yticks(places, [shown(gain.name) for gain in gains])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_xlabel("utility per request, as served minus this arm alone")
    return _svg(figure, "gains")


def _times(report: Report) -> list[datetime]:
    return [datetime.fromtimestamp(at, UTC) for at in report.course["started_s"]]


def _floats(values: Sequence[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values])


def _over_time(rows: int, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: PLC0415

    figure, axes = _figure(rows, height)
    locator = AutoDateLocator(tz=UTC)
    axes[-1].xaxis.set_major_locator(locator)
    axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))
    return figure, axes


def _figure(rows: int, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - only for those who plot

    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
        each.grid(axis="y", color="#ddd", linewidth=0.6)
        each.set_axisbelow(True)
    return figure, list(axes)


def _patch(paint: str) -> Any:
    from matplotlib.patches import Patch  # noqa: PLC0415

    return Patch(color=paint)


def _legend(axes: Any, patches: Sequence[Any], labels: Sequence[str]) -> None:
    """Name what is drawn, to the right; no name is taken for a formula."""
    legend = axes.legend(
        patches, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an element; its ids begin with its name, so that figures do not share any."""
    from matplotlib import rc_context  # noqa: PLC0415

    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing, transparent=True)
    text = drawn.getvalue()
    return text[text.index("<svg") :]
