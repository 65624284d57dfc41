"""The commands by which an operator bounds what the loop may do."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_arms import Which, Why, operator
from autopoiesis.cli_options import Config, DataDir, Json, out, read_settings, refusals, show

control_app = typer.Typer(
    help="Guard rails: freeze, roll back, human arms only, dry run. They outlive restarts.",
    no_args_is_help=True,
)


class Switch(StrEnum):
    """Begin or end it."""

    ON = "on"
    OFF = "off"


OnOff = Annotated[Switch, typer.Argument(metavar="on|off")]


@control_app.command("show")
def control_show(data_dir: DataDir = None, config: Config = None, json: Json = None) -> None:
    """Show what is in force, since when, by whom and why."""
    from autopoiesis.orchestrator.catalogue import asking, show_guard_rails
    from autopoiesis.orchestrator.tables import pairs_table

    with refusals(), asking(read_settings(config, data_dir=data_dir)) as ask:
        told = show_guard_rails(ask)
    show(told, pairs_table("guard rails", told), json)


def _order(
    order: str,
    why: str,
    data_dir: Path | None,
    config: Path | None,
    json: str | None,
    *,
    arm: str = "",
    on: bool = True,
) -> None:
    from autopoiesis.orchestrator.governor import Command
    from autopoiesis.orchestrator.orders import ordering
    from autopoiesis.orchestrator.rails import Order
    from autopoiesis.orchestrator.registrar import Said
    from autopoiesis.orchestrator.tables import write_json

    with refusals(), ordering(read_settings(config, data_dir=data_dir)) as orders:
        told = orders.obey(Command(Order(order), arm, on), Said(operator(), why))
    if json:
        write_json(told, json)
    if json != "-":
        line = f"{told['reason']}. In force: {told['in_force']}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@control_app.command("freeze")
def control_freeze(
    why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Let allocation and arms stay as they are; learning goes on."""
    _order("freeze", why, data_dir, config, json)


@control_app.command("unfreeze")
def control_unfreeze(
    why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Let the loop decide again after a freeze or a rollback."""
    _order("unfreeze", why, data_dir, config, json)


@control_app.command("rollback")
def control_rollback(
    why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Go back to the last allocation that was good, and freeze it."""
    _order("rollback", why, data_dir, config, json)


@control_app.command("human-only")
def control_human_only(
    on: OnOff = Switch.ON,
    why: Why = "",
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Give traffic to arms that people wrote, and to no others."""
    _order("human-only", why, data_dir, config, json, on=on is Switch.ON)


@control_app.command("dry-run")
def control_dry_run(
    on: OnOff = Switch.ON,
    why: Why = "",
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Let the loop decide and record what it would do, and apply nothing."""
    _order("dry-run", why, data_dir, config, json, on=on is Switch.ON)


@control_app.command("allocate")
def control_allocate(
    arm: Which, why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Give one arm all traffic."""
    _order("allocate", why, data_dir, config, json, arm=arm)


@control_app.command("release")
def control_release(
    why: Why = "", data_dir: DataDir = None, config: Config = None, json: Json = None
) -> None:
    """Lift all guard rails: the loop decides again."""
    _order("release", why, data_dir, config, json)
