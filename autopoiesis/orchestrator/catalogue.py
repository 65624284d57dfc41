"""Questions about an instance, running or stopped: its arms and its telemetry.

A running instance answers on its control port, because it alone may open its telemetry file.
"""

from typing import Any

from autopoiesis.arms.registry import RegistryError
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import running_control_url
from autopoiesis.telemetry.endpoint import ask
from autopoiesis.telemetry.query import QueryResult, query_file

ARM_COLUMNS = "id, name, origin, state, parents, created_at, traffic_share, utility, reason"


def ask_telemetry(settings: Settings, query: str, max_rows: int) -> QueryResult:
    """Run one read-only query on the telemetry."""
    url = running_control_url(settings.data_dir)
    return (
        ask(url, query, max_rows) if url else query_file(settings.telemetry_file, query, max_rows)
    )


def list_arms(settings: Settings) -> list[dict[str, Any]]:
    """Return a row per arm, those with the most traffic first."""
    query = f"select {ARM_COLUMNS} from arm_scores order by traffic_share desc, utility desc nulls last, name"  # noqa: S608
    return _as_objects(ask_telemetry(settings, query, 10_000))


def show_arm(settings: Settings, which: str) -> dict[str, Any]:
    """Return everything about one arm, by id, beginning of an id, or name."""
    quoted = which.replace("'", "''")
    query = (
        f"select {ARM_COLUMNS}, pinned, thought, source from arm_scores join arms using (id, name, origin, state, "  # noqa: S608
        f"parents, created_at, reason) where id = '{quoted}' or name = '{quoted}' or starts_with(id, '{quoted}')"
    )
    rows = _as_objects(ask_telemetry(settings, query, 10))
    exact = [row for row in rows if which in {row["id"], row["name"]}]
    if len(exact or rows) != 1:
        found = "no arm" if not rows else f"{len(rows)} arms"
        raise RegistryError(
            f"There is {found} called {which!r}; `autopoiesis arms list` shows them all."
        )
    return (exact or rows)[0]


def _as_objects(result: QueryResult) -> list[dict[str, Any]]:
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]
