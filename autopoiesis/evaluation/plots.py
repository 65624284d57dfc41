"""Plots of a suite's results, as SVG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autopoiesis.evaluation.contestants import FROZEN, ORACLE, OURS, SWITCHING
from autopoiesis.evaluation.parts import Part
from autopoiesis.evaluation.summary import HUMAN, TUNED, Results

mpl.rcParams["svg.hashsalt"] = "autopoiesis"

BEST_HUMAN, BEST_TUNED = "best human arm", "best tuned arm"
_COLOURS = {
    BEST_HUMAN: "#4c72b0",
    BEST_TUNED: "#8172b3",
    SWITCHING: "#937860",
    FROZEN: "#dd8452",
    OURS: "#c44e52",
    ORACLE: "#55a868",
}


def draw(results: Results, summary: dict[str, Any], folder: Path) -> list[str]:
    """Draw all plots into a folder; return the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"gains.svg": _gains(summary), "costs.svg": _costs(results)}
    if results.cost == "misses":
        for i, scenario in enumerate(results.scenarios):
            drawn[f"windows-{i}.svg"] = _windows(results, scenario)
    for name, figure in drawn.items():
        figure.savefig(folder / name, metadata={"Date": None})
    return list(drawn)


def lines(results: Results, scenario: str) -> dict[str, list[Part]]:
    """Return who is shown of a scenario: the best of each group per seed, and the others."""
    shown: dict[str, list[Part]] = {}
    for name, prefix in ((BEST_HUMAN, HUMAN), (BEST_TUNED, TUNED)):
        if group := results.group(prefix):
            shown[name] = results.best(scenario, group)
    for name in results.contestants:
        if "/" not in name:
            shown[name] = results.of(scenario, name)
    return shown


def _gains(summary: dict[str, Any]) -> Figure:
    """Paired gains with their intervals, by scenario and against each rival."""
    scenarios: Sequence[dict[str, Any]] = summary["scenarios"]
    figure = Figure(figsize=(8, 1.5 + 0.32 * sum(len(s["gains"]) for s in scenarios)))
    axes = figure.subplots()
    y, ticks, labels = 0.0, list[float](), list[str]()
    for told in scenarios:
        for rival, gain in told["gains"].items():
            if gain["gain"] is None or not np.isfinite(gain["gain"]):
                continue
            low, high = gain["gain_low"], gain["gain_high"]
            colour = _COLOURS.get(rival.replace(" per trace", ""), "black")
            axes.plot([100 * low, 100 * high], [y, y], color=colour, lw=2)
            axes.plot([100 * gain["gain"]], [y], "o", color=colour, ms=5)
            ticks.append(y)
            labels.append(f"{told['name']}: against {rival.replace(' per trace', '')}")
            y -= 1.0
        y -= 0.6
    axes.axvline(0.0, color="black", lw=0.8)
    axes.set_xlim(-100, 100)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xlabel(
        f"reduction of {summary['cost']} [%], with {summary['confidence']:.0%} interval over seeds"
    )
    figure.tight_layout()
    return figure


def _costs(results: Results) -> Figure:
    """Mean cost per scenario of those that are compared."""
    column = "miss_share" if results.cost == "misses" else results.cost
    figure = Figure(figsize=(max(6.0, 2.0 + 1.1 * len(results.scenarios)), 4))
    axes = figure.subplots()
    names = list(dict.fromkeys(n for s in results.scenarios for n in lines(results, s)))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        means = [
            float(np.mean([p.row[column] for p in lines(results, s).get(name, [])] or [np.nan]))
            for s in results.scenarios
        ]
        places = np.arange(len(means)) + (i - len(names) / 2 + 0.5) * width
        axes.bar(places, means, width, label=name, color=_COLOURS.get(name))
    axes.set_xticks(
        range(len(results.scenarios)), results.scenarios, rotation=30, ha="right", fontsize=8
    )
    axes.set_ylabel("share of requests that miss" if results.cost == "misses" else "total time [s]")
    axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def _windows(results: Results, scenario: str) -> Figure:
    """Share of requests within the objectives, window by window, first seed."""
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    shown = lines(results, scenario)
    for name, parts in shown.items():
        if name not in _COLOURS:
            continue
        _line(axes, name, parts[0])
    first = shown[OURS][0] if OURS in shown else next(iter(shown.values()))[0]
    for at_s in first.shifts_s:
        axes.axvline(at_s, color="grey", ls=":", lw=1)
    axes.set(xlabel="time [s]", ylabel="within objectives", ylim=(-0.03, 1.03), title=scenario)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


def _line(axes: Axes, name: str, part: Part) -> None:
    started_s, requests = np.array(part.windows["started_s"]), np.array(part.windows["requests"])
    share = np.array(part.windows["met"]) / np.maximum(requests, 1.0)
    axes.plot(started_s, share, label=name, color=_COLOURS[name], lw=2 if name == OURS else 1)
