"""Questions about an instance, running or stopped: its arms and its telemetry.

A running instance answers on its control port, because it alone may open its telemetry file. Before
the first start there is no telemetry; then the seeds are all the arms there are.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from difflib import unified_diff
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.arms.registry import Registry, UnknownArmError
from autopoiesis.arms.seeds import seed_arms, slow_seed_arms
from autopoiesis.orchestrator.control_access import NoTokenError, read_token
from autopoiesis.orchestrator.rails import in_force
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import running_control_url
from autopoiesis.telemetry.endpoint import ask as ask_instance
from autopoiesis.telemetry.query import QueryResult, query_file
from autopoiesis.telemetry.records import GuardRails
from autopoiesis.telemetry.store import Store

Ask = Callable[[str, int], QueryResult]
"""Puts a read-only query with a limit of rows."""

ARM_COLUMNS = "id, name, origin, state, parents, created_at, traffic_share, utility, reason"
SINCE_3 = {"kind": "'fast'", "slow": "''", "prompt": "''", "answer": "''"}
"""Columns of arms, and what stands for them in a stopped instance's file of an older schema version."""
SCORES = (
    "state", "traffic_share", "utility", "posterior_mean", "posterior_sd", "windows", "requests"
)  # fmt: skip
MOST_ARMS = 10_000


def ask_telemetry(settings: Settings, query: str, max_rows: int) -> QueryResult:
    """Run one read-only query on the telemetry."""
    url = running_control_url(settings.data_dir)
    if not url:
        return query_file(settings.telemetry_file, query, max_rows)
    try:
        token = read_token(settings.data_dir)
    except NoTokenError:  # on loopback it is not needed for questions
        token = ""
    return ask_instance(url, query, max_rows, token=token)


@contextmanager
def asking(settings: Settings) -> Generator[Ask]:
    """Lend the way to ask about arms, also where no instance has ever run."""
    if running_control_url(settings.data_dir) or settings.telemetry_file.exists():
        yield lambda query, max_rows: ask_telemetry(settings, query, max_rows)
        return
    with Store.open(Path(":memory:")) as store:
        add_seeds(Registry(store))
        yield store.query


def add_seeds(registry: Registry) -> None:
    """Bring the human arms into a registry that lacks them."""
    for arm in (*seed_arms(), *slow_seed_arms()):
        registry.add(arm)


def list_arms(ask: Ask) -> list[dict[str, Any]]:
    """Return a row per arm, those with the most traffic first."""
    columns = f"{ARM_COLUMNS}, {_columns(ask, 'kind')}"
    query = f"select {columns} from arm_scores order by traffic_share desc, utility desc nulls last, name"  # noqa: S608
    return rows_of(ask(query, MOST_ARMS))


def show_arm(ask: Ask, which: str) -> dict[str, Any]:
    """Return all that is known of one arm, by id, unique beginning of an id, or name.

    Raises:
        UnknownArmError: there is none, or more than one.
    """
    (arm,) = _told(ask, f"= {quoted(find_arm(ask, which))}")
    return arm


def register(ask: Ask) -> list[dict[str, Any]]:
    """Return all that is known of every arm, oldest first."""
    return _told(ask, "in (select id from arms)")


def diff_arms(ask: Ask, one: str, other: str) -> dict[str, Any]:
    """Return what two arms differ in: their scores, and a unified diff of their sources, slow ones last."""
    a, b = show_arm(ask, one), show_arm(ask, other)
    lines = unified_diff(
        _whole(a).splitlines(keepends=True),
        _whole(b).splitlines(keepends=True),
        f"{a['name']} ({a['id']})",
        f"{b['name']} ({b['id']})",
    )
    sides = [{name: arm[name] for name in ("id", "name", "origin", *SCORES)} for arm in (a, b)]
    return {"a": sides[0], "b": sides[1], "diff": "".join(lines)}


def _whole(arm: dict[str, Any]) -> str:
    return "\n\n".join(part for part in (arm["source"], arm["slow"]) if part)


def show_guard_rails(ask: Ask) -> dict[str, Any]:
    """Return what an operator has ordered and is in force, since when, by whom and why."""
    query = (
        "select frozen, dry_run, human_only, only_arm, held, guard_rails.reason, changed_at as since, name "
        "from guard_rails left join arms on arms.id = only_arm order by guard_rails.rowid desc limit 1"
    )
    rows = rows_of(ask(query, 1)) if _schema_version(ask) >= 2 else []
    row: dict[str, Any] = dict.fromkeys(("frozen", "dry_run", "human_only"), False)
    row |= {"only_arm": "", "held": "", "reason": "", "since": None, "name": ""}
    row |= rows[0] if rows else {}
    rails = GuardRails(row["frozen"], row["dry_run"], row["human_only"], row["only_arm"])
    return {
        "frozen": rails.frozen,
        "dry_run": rails.dry_run,
        "human_only": rails.human_only,
        "only": rails.only or None,
        "held_window": orjson.loads(row["held"])[0] if row["held"] else None,
        "in_force": in_force(rails, lambda _: row["name"]) or "nothing: the loop decides",
        "reason": row["reason"],
        "since": row["since"],
    }


def _schema_version(ask: Ask) -> int:
    """Return the version of a file; a stopped instance's may be older than this autopoiesis."""
    return int(ask("select schema_version from meta", 1).rows[0][0])


def _columns(ask: Ask, *names: str) -> str:
    """Return columns that came with schema version 3, or what stands for them in an older file."""
    known = _schema_version(ask) >= 3
    return ", ".join(name if known else f"{SINCE_3[name]} as {name}" for name in names)


def find_arm(ask: Ask, which: str) -> str:
    """Return an arm's id; raise `UnknownArmError` unless there is exactly one."""
    name = quoted(which)
    query = (
        f"select id, name from arms where id = {name} or name = {name} or starts_with(id, {name})"  # noqa: S608
    )
    found = ask(query, MOST_ARMS).rows if which else []
    exact = [row for row in found if which in row]
    if len(exact or found) != 1:
        there = "no arm" if not found else f"{len(found)} arms"
        raise UnknownArmError(
            f"There is {there} called {which!r}; `autopoiesis arms list` shows them all."
        )
    return str((exact or found)[0][0])


def quoted(text: str) -> str:
    """Return text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def rows_of(result: QueryResult) -> list[dict[str, Any]]:
    """Return an answer's rows by column."""
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def _told(ask: Ask, which: str) -> list[dict[str, Any]]:
    """Return all that is known of the arms whose id is `which`, a condition of SQL."""
    arms = (
        f"select {ARM_COLUMNS}, {_columns(ask, 'kind')}, pinned, posterior_mean, posterior_sd, windows, "  # noqa: S608
        f"requests, thought, source, {_columns(ask, 'slow', 'prompt', 'answer')} "
        "from arm_scores join arms using (id, name, origin, state, parents, created_at, reason) "
        f"where id {which} order by created_s, id"
    )
    races = (
        'select arm_id, synthesis, started_at as at, "trigger", synthesizer, verdict, gate, '  # noqa: S608
        "gain, gain_low, gain_high, candidates.reason "
        f"from candidates left join syntheses using (synthesis) where arm_id {which} "
        "order by synthesis, position"
    )
    if _schema_version(ask) >= 2:
        history = (
            "select arm_id, happened_at as at, state, pinned, reason from arm_history "  # noqa: S608
            f"where arm_id {which} order by at_s, rowid"
        )
    else:  # a stopped instance's file, to which nobody has written since the upgrade
        history = (
            f"select id as arm_id, null as at, state, pinned, reason from arms where id {which}"  # noqa: S608
        )
    steps = _by_arm(ask, history)
    raced = _by_arm(ask, races)
    return [
        arm | {"history": steps.get(arm["id"], []), "races": raced.get(arm["id"], [])}
        for arm in rows_of(ask(arms, MOST_ARMS))
    ]


def _by_arm(ask: Ask, query: str) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(ask(query, 10 * MOST_ARMS)):
        grouped.setdefault(row.pop("arm_id"), []).append(row)
    return grouped
