"""The commands of the registry: who is in it, and what people do to them."""

import getpass
import socket
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from autopoiesis.cli_options import (
    WRONG_USAGE,
    Config,
    DataDir,
    Json,
    out,
    read_settings,
    refusals,
    show,
    stop_with,
)

arms_app = typer.Typer(help="The registry of arms.", no_args_is_help=True)

Which = Annotated[str, typer.Argument(metavar="ID", help="Id, unique beginning of an id, or name.")]
Why = Annotated[str, typer.Option("--why", help="Reason, kept with the change.")]


def operator() -> str:
    """Return who gives an order: user and machine."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return "an operator"


@arms_app.command("list")
def arms_list(data_dir: DataDir = None, config: Config = None, json: Json = None) -> None:
    """List all arms with what they decide, their origin, state, share of the traffic and utility."""
    from autopoiesis.orchestrator.catalogue import asking, list_arms
    from autopoiesis.orchestrator.tables import arms_table

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        rows = list_arms(ask)
    show(rows, arms_table(rows), json)


@arms_app.command("show")
def arms_show(
    arm: Which, data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Show one arm: its policies, where it comes from, its races, and every step it took and why."""
    from autopoiesis.orchestrator.catalogue import asking, show_arm
    from autopoiesis.orchestrator.tables import arm_panel

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        row = show_arm(ask, arm)
    show(row, arm_panel(row), json)


@arms_app.command("diff")
def arms_diff(
    one: Annotated[str, typer.Argument(metavar="A", help="Id, beginning of an id, or name.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Id, beginning of an id, or name.")],
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Compare two arms: their scores, and what differs in their canonical sources."""
    from autopoiesis.orchestrator.catalogue import asking, diff_arms
    from autopoiesis.orchestrator.tables import diff_view

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        compared = diff_arms(ask, one, other)
    show(compared, diff_view(compared), json, soft_wrap=True)


@arms_app.command("lineage")
def arms_lineage(
    arm: Which, data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Show where an arm comes from and what came of it, with the gain each had in its race."""
    from autopoiesis.orchestrator.catalogue import asking
    from autopoiesis.orchestrator.lineage import lineage
    from autopoiesis.orchestrator.tables import lineage_tree

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        family = lineage(ask, arm)
    show(family, lineage_tree(family), json)


@arms_app.command("add")
def arms_add(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A policy (.py or .policy), fast, slow or both; or slow functions alone (.plan.py).",
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", help="Name of the arm. [default: the file's]")
    ] = "",
    canary: Annotated[bool, typer.Option("--canary", help="Give it traffic at once.")] = False,
    why: Why = "",
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Verify a policy and take it in as a candidate; `promote` then gives it traffic."""
    from autopoiesis.orchestrator.exchange import new_arm, read_policy
    from autopoiesis.orchestrator.orders import ordering
    from autopoiesis.orchestrator.registrar import Said

    with refusals():
        new = new_arm(read_policy(file, time.time()), name=name, canary=canary)
        with ordering(read_settings(config, data_dir=data_dir)) as orders:
            told = orders.add_arm(new, Said(operator(), why))
    _tell(told, json, "added as" if told["new"] else "was here already, it is")


def _change(
    step: str, arm: str, why: str, data_dir: Path | None, config: Path | None, json: str | None
) -> None:
    from autopoiesis.orchestrator.orders import ordering
    from autopoiesis.orchestrator.registrar import Said, Step

    with refusals(), ordering(read_settings(config, data_dir=data_dir)) as orders:
        told = orders.change_arm(arm, Step(step), Said(operator(), why))
    _tell(told, json, "is")


def _tell(told: dict[str, Any], json: str | None, how: str) -> None:
    from autopoiesis.orchestrator.tables import write_json

    if json:
        write_json(told, json)
    if json != "-":
        pinned = ", pinned" if told["pinned"] else ""
        line = f"{told['name']} ({told['id']}) {how} {told['state']}{pinned}: {told['reason']}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@arms_app.command("pin")
def arms_pin(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Keep an arm from being retired."""
    _change("pin", arm, why, data_dir, config, json)


@arms_app.command("unpin")
def arms_unpin(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Let an arm be retired again."""
    _change("unpin", arm, why, data_dir, config, json)


@arms_app.command("promote")
def arms_promote(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Bring an arm one step further: to canary, then live."""
    _change("promote", arm, why, data_dir, config, json)


@arms_app.command("retire")
def arms_retire(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Take an arm out of service; not a pinned one, and not the last live one."""
    _change("retire", arm, why, data_dir, config, json)


@arms_app.command("quarantine")
def arms_quarantine(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Take an arm out of service until something drifts or it is promoted again."""
    _change("quarantine", arm, why, data_dir, config, json)


@arms_app.command("export")
def arms_export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")],
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Write every arm to a folder: a .py file each, and an index of all that is known of them."""
    from autopoiesis.orchestrator.catalogue import asking, register
    from autopoiesis.orchestrator.exchange import export_arms

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        paths = export_arms(register(ask), folder)
    out.print(f"{len(paths) - 1} arms written to {folder}", highlight=False, soft_wrap=True)


@arms_app.command("import")
def arms_import(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to read from.")],
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Take in every policy file of a folder as a candidate; nothing that is here is changed."""
    from autopoiesis.orchestrator.exchange import import_arms
    from autopoiesis.orchestrator.orders import ordering
    from autopoiesis.orchestrator.tables import import_table

    with refusals(), ordering(read_settings(config, data_dir=data_dir)) as orders:
        rows = import_arms(folder, orders, operator(), time.time())
    show(rows, import_table(rows), json)
    refused = sum(row["verdict"] == "refused" for row in rows)
    if refused:
        stop_with(WRONG_USAGE, f"{refused} of {len(rows)} files were refused.")
