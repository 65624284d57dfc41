"""The commands by which an operator changes the replicas of a running instance."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_arms import Why, operator
from autopoiesis.cli_control import control_app
from autopoiesis.cli_options import (
    FAILED,
    Config,
    DataDir,
    Json,
    read_settings,
    refusals,
    say,
    show,
    stop_with,
)

Names = Annotated[list[str] | None, typer.Argument(metavar="[REPLICA]...", show_default=False)]
Named = Annotated[list[str], typer.Argument(metavar="REPLICA...", show_default=False)]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Return when it is done, or when it is ordered.")
]


@control_app.command("fleet")
def control_fleet(data_dir: DataDir = None, config: Config = None, json: Json = None) -> None:
    """Show what each replica does, and may do at once."""
    from autopoiesis.orchestrator.fleet_command import RunningFleet
    from autopoiesis.orchestrator.tables import fleet_table

    with refusals():
        replicas = RunningFleet(read_settings(config, data_dir=data_dir)).replicas()
    show(replicas, fleet_table(replicas), json)


@control_app.command("restart")
def control_restart(
    replicas: Names = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that a replica computes at once. [default: as it is]"),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a replica computes in one step. [default: as it is]"),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="GPUs that a replica spans. [default: as it is]")
    ] = None,
    wait: Wait = True,
    why: Why = "",
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Restart replicas (all, if none is named) one after the other, if wanted with other limits.

    Each drains first; one that does not come up gets its old limits back, and the rest stays as it is.
    """
    limits = (max_num_seqs or 0, max_num_batched_tokens or 0, tensor_parallel or 0)
    _order("restart", replicas or [], limits, wait, why, data_dir, config, json)


@control_app.command("stop")
def control_stop(
    replicas: Named, wait: Wait = True, why: Why = "", data_dir: DataDir = None, config: Config = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Drain replicas, then end their processes; those that run elsewhere only get no traffic."""
    _order("stop", replicas, (0, 0, 0), wait, why, data_dir, config, json)


@control_app.command("start")
def control_start(
    replicas: Names = None, wait: Wait = True, why: Why = "", data_dir: DataDir = None, config: Config = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Start replicas that are off or asleep (all, if none is named)."""
    _order("start", replicas or [], (0, 0, 0), wait, why, data_dir, config, json)


@control_app.command("sleep")
def control_sleep(
    replicas: Named, wait: Wait = True, why: Why = "", data_dir: DataDir = None, config: Config = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Drain vLLM replicas and free their GPUs' memory (they need --enable-sleep-mode)."""
    _order("sleep", replicas, (0, 0, 0), wait, why, data_dir, config, json)


@control_app.command("wake")
def control_wake(
    replicas: Names = None, wait: Wait = True, why: Why = "", data_dir: DataDir = None, config: Config = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Wake replicas that are asleep (all, if none is named)."""
    _order("wake", replicas or [], (0, 0, 0), wait, why, data_dir, config, json)


def _order(
    order: str,
    replicas: list[str],
    limits: tuple[int, int, int],
    wait: bool,
    why: str,
    data_dir: Path | None,
    config: Path | None,
    json: str | None,
) -> None:
    from autopoiesis.orchestrator.fleet_command import FleetChangeError, RunningFleet
    from autopoiesis.orchestrator.fleet_orders import FleetCommand, FleetOrder
    from autopoiesis.orchestrator.registrar import Said
    from autopoiesis.orchestrator.tables import fleet_table
    from autopoiesis.replicas.limits import Limits

    command = FleetCommand(FleetOrder(order), tuple(replicas), Limits(*limits))
    with refusals():
        fleet = RunningFleet(read_settings(config, data_dir=data_dir))
        names = fleet.order(command, Said(operator(), why))
        try:
            now = fleet.wait(names, say) if wait else fleet.replicas()
        except FleetChangeError as error:
            stop_with(FAILED, str(error))
    show(now, fleet_table(now), json)
