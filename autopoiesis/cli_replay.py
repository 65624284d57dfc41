"""`autopoiesis replay`: a trace in the twin, or what arms would have earned on stored windows."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_options import (
    WRONG_USAGE,
    Config,
    DataDir,
    Json,
    Profiles,
    Quiet,
    Seed,
    SloTpot,
    SloTtft,
    read_settings,
    refusals,
    show,
    stop_with,
)


def replay(
    trace: Annotated[
        Path | None, typer.Argument(help="Trace to run in the twin.", show_default=False)
    ] = None,
    counterfactual: Annotated[
        bool,
        typer.Option(
            "--counterfactual",
            help="Instead of a trace, estimate what each --arm (or each that serves) would have earned "
            "on the stored windows of the data directory.",
        ),
    ] = False,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows", min=3, help="With --counterfactual: the last N windows. [default: 60]"
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=1024, help="Replicas in the twin.")] = 4,
    profile: Profiles = None,
    speed: Annotated[
        float, typer.Option(min=0.001, help="Replay this many times faster than recorded.")
    ] = 1.0,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="ID|NAME|FILE.py",
            help="Run this arm instead of every human one; repeatable.",
        ),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online/--no-online", help="Also run the learning system.")
    ] = True,
    evolve: Annotated[
        bool, typer.Option("--evolve", help="Let the learning system synthesize arms.")
    ] = False,
    window: Annotated[
        float | None, typer.Option("--window", help="Length of a window [s]. [default: 10]")
    ] = None,
    for_s: Annotated[
        float | None, typer.Option("--for", metavar="S", help="Use this many seconds of the trace.")
    ] = None,
    capacity: Annotated[
        Path | None,
        typer.Option(
            "--capacity",
            metavar="FILE",
            help="Capacity trace that takes and gives replicas meanwhile, as spot markets do.",
        ),
    ] = None,
    notice: Annotated[
        float,
        typer.Option(
            "--notice", min=0.0, metavar="S", help="How long before its loss a replica drains."
        ),
    ] = 0.0,
    start_up: Annotated[
        float | None,
        typer.Option(
            "--start-up",
            min=0.0,
            metavar="S",
            help="How long a replica takes to start. [default: 31 to 116, by chance]",
        ),
    ] = None,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    data_dir: DataDir = None,
    config: Config = None,
    seed: Seed = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Run a trace in the twin: every human arm (or the given ones), the online system, the oracle.

    With --counterfactual: what arms would have earned on windows that an instance has stored.
    """
    from autopoiesis.orchestrator.counterfactual_command import counterfactual_command
    from autopoiesis.orchestrator.replay_command import replay_command
    from autopoiesis.orchestrator.tables import counterfactual_table, replay_table

    if counterfactual == (trace is not None):
        stop_with(WRONG_USAGE, "Give a trace to replay, or --counterfactual for stored windows.")
    if windows is not None and not counterfactual:
        stop_with(WRONG_USAGE, "--windows counts stored windows; give it with --counterfactual.")
    with refusals():
        settings = read_settings(
            config, profile=profile, window_s=window, slo_ttft_s=slo_ttft, slo_tpot_s=slo_tpot,
            data_dir=data_dir, seed=seed,
        )  # fmt: skip
        if trace is None:
            told = counterfactual_command(settings, arm or (), windows, quiet=quiet or json == "-")
            show(told.as_dict(), counterfactual_table(told), json)
            return
        report = replay_command(
            settings, trace, replicas=replicas, speed=speed, arms=arm or (), online=online, evolve=evolve,
            for_s=for_s, quiet=quiet or json == "-", capacity_file=capacity, notice_s=notice,
            start_up_s=start_up,
        )  # fmt: skip
    show(report.as_dict(), replay_table(report), json)
