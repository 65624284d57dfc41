"""Where an arm comes from, and what came of it."""

from collections.abc import Callable
from typing import Any

from autopoiesis.orchestrator.catalogue import MOST_ARMS, Ask, find_arm, quoted, rows_of

_RELATIVES = """
with recursive raced as (
    select distinct on (arm_id) * from candidates where arm_id <> ''
    order by arm_id, verdict = 'promoted' desc, synthesis desc, position desc
),
known as (
    select
        coalesce(a.id, r.arm_id) as id,
        coalesce(a.name, r.arm_id) as name,
        coalesce(a.origin, s.synthesizer, '') as origin,
        coalesce(a.state, r.verdict) as state,
        coalesce(a.parents, r.parents) as parents,
        r.gain, r.gain_low, r.gain_high,
        a.id is not null as kept
    from arms as a
    full join raced as r on r.arm_id = a.id
    left join syntheses as s using (synthesis)
),
ancestors as (
    select id, parents from known where id = {arm}
    union
    select k.id, k.parents from known as k, ancestors as a where list_contains(a.parents, k.id)
),
descendants as (
    select id from known where id = {arm}
    union
    select k.id from known as k, descendants as d where k.kept and list_contains(k.parents, d.id)
)
select * exclude (kept) from known
where id in (select id from ancestors) or id in (select id from descendants)
order by id
"""
"""Ancestors may be proposals that were never promoted; descendants are arms."""

Row = dict[str, Any]


def lineage(ask: Ask, which: str) -> Row:
    """Return an arm with its `ancestors` and `descendants`, each nested in the same way.

    A relative is told in full where it is met first and marked `repeated` elsewhere: families of
    arms with two parents each would grow without bound.

    Raises:
        UnknownArmError: there is no such arm.
    """
    arm_id = find_arm(ask, which)
    known = {
        row["id"]: row for row in rows_of(ask(_RELATIVES.format(arm=quoted(arm_id)), MOST_ARMS))
    }
    children: dict[str, list[str]] = {}
    for row in known.values():
        for parent in dict.fromkeys(row["parents"]):
            children.setdefault(parent, []).append(row["id"])
    return known[arm_id] | {
        "ancestors": _nested(
            arm_id, known, lambda i: known[i]["parents"] if i in known else [], "ancestors"
        ),
        "descendants": _nested(arm_id, known, lambda i: children.get(i, []), "descendants"),
    }


def _nested(
    root: str, known: dict[str, Row], next_of: Callable[[str], list[str]], name: str
) -> list[Row]:
    """Nest relatives breadth first, so that each is told in full where it is closest."""
    tops: list[Row] = []
    met = {root}
    level = [(tops, root)]
    while level:
        below: list[tuple[list[Row], str]] = []
        for into, of in level:
            for relative in dict.fromkeys(next_of(of)):
                node = _node(relative, known)
                into.append(node)
                if relative in met:
                    node["repeated"] = True
                    continue
                met.add(relative)
                node[name] = []
                below.append((node[name], relative))
        level = below
    return tops


def _node(arm_id: str, known: dict[str, Row]) -> Row:
    unknown: Row = {"id": arm_id, "name": arm_id, "origin": "", "state": "unknown", "parents": []}
    return dict(known.get(arm_id, unknown | dict.fromkeys(("gain", "gain_low", "gain_high"))))
