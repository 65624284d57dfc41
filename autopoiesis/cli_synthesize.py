"""The command that runs one synthesis cycle by hand."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_arms import operator
from autopoiesis.cli_options import (
    FAILED,
    WRONG_USAGE,
    Config,
    DataDir,
    Json,
    Profiles,
    Quiet,
    Seed,
    SloTpot,
    SloTtft,
    err,
    out,
    read_settings,
    refusals,
    stop_with,
)


def synthesize(
    trace: Annotated[
        Path | None, typer.Option(help="Synthesize on this trace instead of stored windows.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Synthesize on this many stored windows, the newest. [default: 12]"),
    ] = None,
    synthesizer: Annotated[
        str | None,
        typer.Option(help="Who writes: genetic, openai, fleet or files. [default: genetic]"),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option("--budget-seconds", metavar="S", help="Longest time it may take."),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, max=1024, help="Replicas in the twin, for --trace.")
    ] = 4,
    profile: Profiles = None,
    speed: Annotated[
        float, typer.Option(min=0.001, help="Replay the trace this many times faster.")
    ] = 1.0,
    window: Annotated[
        float | None,
        typer.Option("--window", help="Length of a window of the trace [s]. [default: 10]"),
    ] = None,
    for_s: Annotated[
        float | None, typer.Option("--for", metavar="S", help="Use this many seconds of the trace.")
    ] = None,
    capacity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --trace: GPUs come and go as this capacity trace says, --replicas of each type at most, "
            "and slow functions evolve too.",
        ),
    ] = None,
    allow_unsandboxed: Annotated[
        bool,
        typer.Option(
            "--allow-unsandboxed",
            help="Run slow functions although this machine cannot shut them off; `doctor` says what is lacking.",
        ),
    ] = False,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            "--replay-exchange",
            metavar="FILE",
            help="Repeat a recorded cycle: its brief and its models' replies.",
        ),
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    seed: Seed = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Run one synthesis cycle by hand: propose, verify, race, judge."""
    from autopoiesis.orchestrator.synthesize import (
        USUAL_WINDOWS,
        repeat_recorded,
        synthesize_on_trace,
        synthesize_on_windows,
    )
    from autopoiesis.orchestrator.tables import synthesis_table, write_json

    if sum(x is not None for x in (trace, windows, recording)) > 1:
        stop_with(WRONG_USAGE, "Give one of --trace, --windows and --replay-exchange.")
    if capacity is not None and trace is None:
        stop_with(WRONG_USAGE, "A capacity trace goes with a trace; give --trace too.")
    if synthesizer == "none":
        stop_with(
            WRONG_USAGE,
            "The synthesizer none writes nothing; give genetic, openai, fleet or files.",
        )
    silent = quiet or json == "-"
    with refusals():
        settings = read_settings(
            config, synthesizer=synthesizer, synthesis_budget_s=budget_s, profile=profile, window_s=window,
            slo_ttft_s=slo_ttft, slo_tpot_s=slo_tpot, data_dir=data_dir, seed=seed,
        )  # fmt: skip
        if recording is not None:
            report = repeat_recorded(recording, quiet=silent)
        elif trace is not None:
            report = synthesize_on_trace(
                settings,
                trace,
                replicas=replicas,
                speed=speed,
                for_s=for_s,
                quiet=silent,
                capacity_file=capacity,
                allow_unsandboxed=allow_unsandboxed,
            )
        else:
            report = synthesize_on_windows(
                settings, windows or USUAL_WINDOWS, by=operator(), quiet=silent
            )
    if json:
        write_json(report.as_dict(), json)
    if json != "-":
        out.print(synthesis_table(report.row, report.kept))
    elif not quiet:
        for line in (report.row.error or report.row.conclusion, report.kept):
            err.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.failed:
        raise typer.Exit(FAILED)
