"""What the telemetry of a stopped instance says of who served, and of what was made meanwhile."""

from pathlib import Path

from autopoiesis.evaluation.contestants import Ran, is_harmful
from autopoiesis.evaluation.effort import Spent
from autopoiesis.evaluation.scenario import Situation
from autopoiesis.orchestrator.replay_fleet import Served
from autopoiesis.telemetry.answers import JSONValue
from autopoiesis.telemetry.query import query_file

MAX_ROWS = 100_000

SPENT = (
    "select coalesce(sum(cpu_seconds), 0), count(*), coalesce(sum(tokens), 0)::bigint, "
    "coalesce(sum(cost_usd), 0) from syntheses"
)
MADE = (
    "select made.id, made.source, coalesce(beaten.source, ''), p.made_s, "
    "made.id in (select arm_id from arm_history where state = 'live') "
    "from (select unnest(promoted) as id, beaten, started_s + seconds as made_s from syntheses) as p "
    "join arms as made on made.id = p.id left join arms as beaten on beaten.id = p.beaten order by p.made_s"
)
SERVED = (
    "select any_value(w.started_s), string_agg(distinct m.name, '+' order by m.name) "
    "from allocations as a join windows as w on w.window_id = a.window_id join arms as m on m.id = a.arm_id "
    "group by a.window_id order by a.window_id"
)


def ran(situation: Situation, served: Served, telemetry: Path, began_s: float) -> Ran:
    """Return a run with what the file says of it; the first request was due at `began_s` [Unix seconds].

    Whether a promotion was harmful is told in the twin, as for everybody.

    Raises TelemetryError or QueryError if the file cannot be read.
    """
    cpu_s, cycles, tokens, cost_usd = _rows(telemetry, SPENT)[0]
    made = {row[0]: row for row in _rows(telemetry, MADE)}
    live = {arm for arm, row in made.items() if row[4]}
    harmful = {
        arm
        for arm, (_, source, beaten, made_s, _) in made.items()
        if beaten and is_harmful(situation, source, beaten, made_s - began_s)
    }
    decisions = {
        int((started_s - began_s) // situation.window_s): names
        for started_s, names in _rows(telemetry, SERVED)
    }
    return Ran(
        served,
        Spent(cpu_s=cpu_s, cycles=cycles, tokens=tokens, cost_usd=cost_usd),
        promoted=len(made),
        harmful=len(harmful),
        live=len(live),
        harmful_live=len(live & harmful),
        decisions={window: names for window, names in decisions.items() if window >= 0},
        said="\n".join(row[1] for row in list(made.values())[-2:]),
    )


def _rows(telemetry: Path, sql: str) -> list[list[JSONValue]]:
    return query_file(telemetry, sql, max_rows=MAX_ROWS).rows
