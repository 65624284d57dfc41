"""The terminal view of a running gateway: traffic, allocation per arm, regret, events."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autopoiesis.orchestrator.tables import number

BLOCKS = " ▁▂▃▄▅▆▇█"
HISTORY = 30
"""Windows shown in a sparkline."""
STATE_STYLE = {
    "live": "green",
    "canary": "yellow",
    "quarantined": "red",
    "retired": "dim",
    "candidate": "dim",
}
EVENT_STYLE = {
    "drift": "yellow",
    "synthesis": "magenta",
    "arm": "cyan",
    "fault": "red",
    "replica": "red",
}


def sparkline(values: Sequence[float | None], top: float | None = None) -> str:
    """Draw values as one line of block characters; missing ones as a dot."""
    shown = list(values)[-HISTORY:]
    highest = top or max((v for v in shown if v is not None), default=0.0) or 1.0
    return "".join(
        "·" if v is None else BLOCKS[min(8, max(0, round(8 * v / highest)))] for v in shown
    )


def render(status: Mapping[str, Any], title: str) -> RenderableType:
    """Draw the controller's `/status`."""
    windows: list[dict[str, Any]] = status["windows"]
    return Group(
        Text(title, style="bold"),
        Panel(_traffic(status["traffic"], windows), title="traffic", title_align="left"),
        Panel(_arms(status["arms"], windows), title="arms: who serves", title_align="left"),
        Panel(_learning(windows, status["synthesis"]), title="learning", title_align="left"),
        Panel(_events(status["events"]), title="events", title_align="left"),
    )


def _traffic(traffic: Mapping[str, Any], windows: Sequence[Mapping[str, Any]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    rows = (
        ("requests/s", number(traffic["requests_rps"], 1), [w["requests"] for w in windows]),
        ("output tokens/s", number(traffic["tokens_s"], 0), [w["throughput_tokens_s"] for w in windows]),
        ("TTFT p50 | p99 [s]", f"{number(traffic['ttft_p50_s'], 2)} | {number(traffic['ttft_p99_s'], 2)}",
         [w["ttft_p99_s"] for w in windows]),
        ("TPOT p50 | p99 [s]", f"{number(traffic['tpot_p50_s'])} | {number(traffic['tpot_p99_s'])}",
         [w["tpot_p99_s"] for w in windows]),
        ("in flight", number(traffic["in_flight"]), []),
    )  # fmt: skip
    for name, now, history in rows:
        grid.add_row(Text(name), Text(now, style="bold"), Text(sparkline(history), style="blue"))
    return grid


def _arms(arms: Sequence[Mapping[str, Any]], windows: Sequence[Mapping[str, Any]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for arm in arms:
        share = arm["traffic_share"] or 0.0
        history = [w["shares"].get(arm["id"], 0.0) for w in windows]
        if arm["origin"] == "human" and not share and not any(history[-HISTORY:]):
            continue
        grid.add_row(
            arm["name"],
            Text(arm["origin"], style="magenta" if arm["origin"] != "human" else "dim"),
            Text(arm["state"], style=STATE_STYLE.get(arm["state"], "")),
            Text(f"{share:4.0%}", style="bold" if share else "dim"),
            Text(sparkline(history, top=1.0), style="green"),
            Text(f"utility {number(arm['utility'])}"),
        )
    return grid


def _learning(windows: Sequence[Mapping[str, Any]], synthesis: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    utilities, regrets = [w["utility"] for w in windows], [w["regret"] for w in windows]
    latest = windows[-1] if windows else {"utility": None, "regret": None}
    grid.add_row(
        Text("utility [0..1]"),
        Text(number(latest["utility"]), style="bold"),
        Text(sparkline(utilities, 1.0), "green"),
    )
    grid.add_row(
        "regret",
        Text(number(latest["regret"]), style="bold"),
        Text(sparkline(regrets), style="red"),
    )
    drifts = [f"window {w['window']}: {w['drift']}" for w in windows if w["drift"]]
    grid.add_row(
        "drift", Text(drifts[-1] if drifts else "none", style="yellow" if drifts else "dim"), ""
    )
    state = (
        f"writing policies for {time.time() - synthesis['since_s']:.0f} s"
        if synthesis["running"]
        else "idle"
    )
    grid.add_row("synthesizer", Text(state, style="magenta" if synthesis["running"] else "dim"), "")
    return grid


def _events(events: Sequence[Mapping[str, Any]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for event in list(events)[-8:]:
        clock = time.strftime("%H:%M:%S", time.localtime(event["at_s"]))
        grid.add_row(
            clock, Text(event["kind"], style=EVENT_STYLE.get(event["kind"], "")), event["message"]
        )
    return grid


def one_line(window: Mapping[str, Any], arms: Mapping[str, str]) -> str:
    """Tell one window in one line, where there is no terminal to draw on."""
    shares = ", ".join(
        f"{arms.get(a, a)} {s:.0%}"
        for a, s in sorted(window["shares"].items(), key=lambda x: -x[1])
    )
    return (
        f"window {window['window']:>4}: {window['requests']:>5} requests, "
        f"TTFT p50 {number(window['ttft_p50_s'], 2)} s, TPOT p50 {number(window['tpot_p50_s'])} s, "
        f"utility {number(window['utility'])}, regret {number(window['regret'])}"
        f"{', drift: ' + window['drift'] if window['drift'] else ''}; {shares}"
    )
