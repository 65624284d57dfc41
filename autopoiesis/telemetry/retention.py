"""What is forgotten, and when: detail by whole hours, history only when told."""

from duckdb import DuckDBPyConnection as Connection

HOUR_S = 3600.0

DETAIL = {"requests": "arrived_s", "replicas": "at_s"}
"""Tables with a row per request or per scrape, and their column of time."""
BY_WINDOW = ("cells", "arm_estimates", "allocations", "twin_errors", "plans")
"""Tables whose rows go with their window."""


def forget(c: Connection, time_s: float, *, history: bool) -> None:
    """Delete the detail of the whole hours before `time_s`; with `history`, the windows too.

    What is known of arms stays: the registry forgets nothing.
    """
    edge_s = time_s // HOUR_S * HOUR_S
    for table, column in DETAIL.items():
        c.execute(f"delete from {table} where {column} < ?", [edge_s])  # noqa: S608
    if not history:
        return
    c.execute(
        "delete from windows where ended_s < ? and window_id < (select max(window_id) from windows)",
        [edge_s],
    )
    for table in BY_WINDOW:
        c.execute(f"delete from {table} where window_id < (select min(window_id) from windows)")  # noqa: S608
    c.execute(
        "delete from candidates where synthesis in "
        "(select synthesis from syntheses where started_s < ?) and arm_id not in (select id from arms)",
        [edge_s],
    )
    c.execute("delete from syntheses where started_s < ?", [edge_s])
    c.execute("delete from events where at_s < ?", [edge_s])
