"""The command that runs the evaluation suites."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_options import (
    FAILED,
    WRONG_USAGE,
    Json,
    Quiet,
    out,
    refusals,
    show,
    stop_with,
)


def bench(
    suite: Annotated[
        str, typer.Argument(help="dynamics, paper, agentic, live or ablation.")
    ] = "dynamics",
    folder: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Results; a run that was stopped goes on there."),
    ] = Path("bench-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few scenarios, short and with few seeds: minutes.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Seeds per scenario. [default: 10; quick: 2]"),
    ] = None,
    first_seed: Annotated[
        int,
        typer.Option(min=0, max=900, help="The first of them: others than those built with."),
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes. [default: one per core]")
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            "--scenario", metavar="WORD", help="Only scenarios with this in their name; repeatable."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD", help="Leave out contestants with this in their name; repeatable."
        ),
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the sample traces. [default: the checkout's]"),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compare fixed, tuned, switching and evolving policies on the same traffic, paired by seed."""
    from autopoiesis.evaluation.bench import BenchError, run_bench
    from autopoiesis.evaluation.report import gains_table
    from autopoiesis.evaluation.runner import UnitFailed

    try:
        with refusals():
            summary = run_bench(
                suite, folder, quick=quick, seeds=seeds, first_seed=first_seed, jobs=jobs,
                scenarios=scenario or (), without=without or (), traces=traces, quiet=quiet or json == "-",
            )  # fmt: skip
    except BenchError as error:
        stop_with(WRONG_USAGE, str(error))
    except UnitFailed as error:
        stop_with(FAILED, str(error))
    show(summary, gains_table(summary), json)
    if json != "-":
        out.print(f"{folder}/report.html", highlight=False)
