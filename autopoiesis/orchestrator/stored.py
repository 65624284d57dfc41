"""What an instance has stored, running or stopped: its windows, its requests, its fleet and its arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.settings import RunDir
from autopoiesis.orchestrator.catalogue import ask_telemetry
from autopoiesis.orchestrator.fleet_watch import specs_of
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import running_control_url
from autopoiesis.replicas.fleet import read_fleet
from autopoiesis.telemetry.records import RequestRecord
from autopoiesis.telemetry.requests import COLUMNS, requests_of
from autopoiesis.twin.latency import profile
from autopoiesis.twin.simulation import ReplicaSpec

MOST_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """A window that has settled."""

    started_s: float
    ended_s: float
    requests: int
    objective: Objective
    allocation: Allocation


def stored_windows(settings: Settings, newest: int) -> tuple[StoredWindow, ...]:
    """Return the newest windows with requests, oldest first; those whose allocation is gone are left out."""
    since = (
        f"(select min(window_id) from (select window_id from windows where requests > 0 "  # noqa: S608
        f"order by window_id desc limit {newest}))"
    )
    rows = _ask(
        settings,
        "select window_id, started_s, ended_s, requests, objective['slo_ttft_s'], objective['slo_tpot_s'], "  # noqa: S608
        "coalesce(objective['late_worth'], 1.0) "
        f"from windows where requests > 0 and window_id >= {since} order by window_id",
    )
    cells: dict[int, list[Cell]] = {}
    for window, arm_id, replicas, shards, propensity in _ask(
        settings,
        "select window_id, arm_id, replicas, shards, propensity from allocations "  # noqa: S608
        f"where window_id >= {since} order by window_id, cell",
    ):
        cells.setdefault(window, []).append(
            Cell(arm_id, tuple(replicas), tuple(shards), propensity)
        )
    return tuple(
        StoredWindow(
            float(started_s),
            float(ended_s),
            int(requests),
            Objective(float(ttft_s), float(tpot_s), float(late_worth)),
            Allocation(window, tuple(cells[window])),
        )
        for window, started_s, ended_s, requests, ttft_s, tpot_s, late_worth in rows
        if window in cells
    )


def stored_requests_between(settings: Settings, from_s: float, to_s: float) -> list[RequestRecord]:
    """Return the requests that arrived in [from_s, to_s), in order of arrival."""
    return requests_of(
        [
            tuple(row)
            for row in _ask(
                settings,
                f"select {', '.join(COLUMNS)} from requests "  # noqa: S608 - our own columns and numbers
                f"where arrived_s >= {from_s!r} and arrived_s < {to_s!r} order by arrived_s",
            )
        ]
    )


def stored_arms(settings: Settings) -> list[Arm]:
    """Return all arms that have fast functions, oldest first."""
    rows = _ask(
        settings,
        "select id, name, origin, state, source from arms where source <> '' order by created_s, id",
    )
    return [
        Arm(i, name, Origin(origin), State(state), source, 0.0)
        for i, name, origin, state, source in rows
    ]


def stored_fleet(settings: Settings, names: Sequence[str]) -> list[ReplicaSpec]:
    """Return the fleet as the twin models it; of a stopped one, with the profiles of the settings."""
    if running_control_url(settings.data_dir) is not None:
        members = read_fleet(RunDir(settings.run_dir).fleet)
        return list(specs_of(members))
    known = names or [f"replica-{i}" for i in range(settings.simulate)]
    kinds = settings.profile
    return [ReplicaSpec(name, profile(kinds[i % len(kinds)])) for i, name in enumerate(known)]


def _ask(settings: Settings, query: str) -> list[Any]:
    return list(ask_telemetry(settings, query, MOST_ROWS).rows)
