"""What all commands share: options, exit codes, and how a refusal is told."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType

FAILED, WRONG_USAGE, CANNOT_START = 1, 2, 3

out = Console()
err = Console(stderr=True)

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Telemetry, logs and run-time files. [default: .autopoiesis]"),
]
Config = Annotated[
    Path | None, typer.Option("--config", help="Settings as TOML; flags override it.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of every random choice. [default: 0]")
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE|-", help="Write JSON to a file, or to standard output with -."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details.")]
SloTtft = Annotated[
    float | None,
    typer.Option("--slo-ttft", help="Objective for the time to first token [s]. [default: 1]"),
]
SloTpot = Annotated[
    float | None,
    typer.Option("--slo-tpot", help="Objective for the time per output token [s]. [default: 0.1]"),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option("--profile", help="Latency profile of the replicas; repeat for a mixed fleet."),
]

FleetFile = Annotated[
    Path | None,
    typer.Option(
        "--fleet-file",
        help="File with a server's URL per line, read again every few seconds.",
    ),
]
Windows = Annotated[
    int | None, typer.Option("--windows", min=1, help="Use the last N windows. [default: all]")
]


def say(line: str) -> None:
    """Print one line to stderr, as it is."""
    err.print(line, highlight=False, markup=False, soft_wrap=True)


def say_nothing(_line: str) -> None:
    """Print nothing."""


def stop_with(code: int, message: str) -> NoReturn:
    """Print one sentence to stderr and exit."""
    err.print(f"autopoiesis: {message}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def show(
    value: object, table: RenderableType, json: str | None, *, soft_wrap: bool = False
) -> None:
    """Print a table, write its value as JSON to the file `json`, or print the JSON alone for `-`."""
    from autopoiesis.orchestrator.tables import write_json

    if json:
        write_json(value, json)
    if json != "-":
        out.print(table, soft_wrap=soft_wrap)


@contextmanager
def refusals() -> Generator[None]:
    """Turn what the rooms refuse into one sentence and the right exit code."""
    from autopoiesis.arms.language import PolicyError
    from autopoiesis.arms.registry import RegistryError
    from autopoiesis.orchestrator.control_access import NoTokenError
    from autopoiesis.orchestrator.control_client import RefusedError
    from autopoiesis.orchestrator.counterfactual import CounterfactualError
    from autopoiesis.orchestrator.exchange import FolderError
    from autopoiesis.orchestrator.rails import OrderError
    from autopoiesis.orchestrator.report import ReportError
    from autopoiesis.orchestrator.settings import SettingsError
    from autopoiesis.orchestrator.startup import CannotStartError
    from autopoiesis.replicas.probe import ProbeError
    from autopoiesis.synthesis.brief import BriefError
    from autopoiesis.telemetry.query import QueryError
    from autopoiesis.telemetry.store import TelemetryError
    from autopoiesis.twin.calibration import CalibrationError
    from autopoiesis.twin.hardware import HardwareError
    from autopoiesis.twin.profile_files import ProfileError
    from autopoiesis.twin.speed import SpeedError
    from autopoiesis.twin.trace import TraceError

    try:
        yield
    except (CannotStartError, ProbeError, TelemetryError, NoTokenError) as error:
        stop_with(CANNOT_START, str(error))
    except (SettingsError, TraceError, PolicyError, RegistryError, QueryError) as error:
        stop_with(WRONG_USAGE, str(error))
    except (RefusedError, FolderError, OrderError, CalibrationError, ProfileError) as error:
        stop_with(WRONG_USAGE, str(error))
    except (HardwareError, SpeedError, BriefError, ReportError, CounterfactualError) as error:
        stop_with(WRONG_USAGE, str(error))


def read_settings(config: Path | None, **flags: Any) -> Any:
    """Merge flags (None: not given), environment and file."""
    from autopoiesis.orchestrator.settings import load_settings

    lists = {
        name: tuple(value) if value else None
        for name, value in flags.items()
        if isinstance(value, list)
    }
    return load_settings(config, {**flags, **lists})
