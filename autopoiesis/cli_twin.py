"""The commands of the twin: how true it is, how it is made true, and how fast it is."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_options import (
    Config,
    DataDir,
    Json,
    Profiles,
    Quiet,
    Seed,
    Windows,
    read_settings,
    refusals,
    say,
    say_nothing,
    show,
)

twin_app = typer.Typer(help="The twin: how true and how fast it is.", no_args_is_help=True)

OfReplicas = Annotated[
    list[str] | None,
    typer.Option(
        "--replica", metavar="NAME", help="Replicas of one class; repeatable. [default: all]"
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1, help="The engine's limit. [default: as seen in its metrics, or the profile's]"
    ),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens", min=1, help="The engine's limit. [default: the profile's]"
    ),
]
KvTokens = Annotated[
    int | None, typer.Option(min=1, help="Size of the KV cache. [default: the profile's]")
]


@twin_app.command("calibrate")
def twin_calibrate(
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the profile here.")
    ] = None,
    profile: Profiles = None,
    replica: OfReplicas = None,
    windows: Windows = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    kv_tokens: KvTokens = None,
    data_dir: DataDir = None,
    config: Config = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Refit the latency profile to what the replicas really did, from the telemetry."""
    from autopoiesis.orchestrator.tables import calibration_table
    from autopoiesis.orchestrator.twin_commands import Engine, calibrate_command

    with refusals():
        calibration = calibrate_command(
            read_settings(config, data_dir=data_dir, profile=profile), replica or (), windows,
            Engine(max_num_seqs, max_num_batched_tokens, kv_tokens), out_file,
            say_nothing if quiet else say,
        )  # fmt: skip
    show(calibration.as_dict(), calibration_table(calibration), json)


@twin_app.command("validate")
def twin_validate(
    split: Annotated[
        float, typer.Option(help="Calibrate on this share of the time, validate on the rest.")
    ] = 0.5,
    turns: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Calibrate on every other stretch of so many seconds instead."
        ),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Take the profile as it is.")
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg|.png", help="Draw quantiles against each other."),
    ] = None,
    profile: Profiles = None,
    replica: OfReplicas = None,
    windows: Windows = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxBatchedTokens = None,
    kv_tokens: KvTokens = None,
    data_dir: DataDir = None,
    config: Config = None,
    seed: Seed = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Tell how far the twin is from what the replicas really did, on requests not fitted to."""
    from autopoiesis.orchestrator.tables import validation_table
    from autopoiesis.orchestrator.twin_commands import Engine, validate_command

    with refusals():
        validation, _ = validate_command(
            read_settings(config, data_dir=data_dir, profile=profile, seed=seed), replica or (), windows,
            Engine(max_num_seqs, max_num_batched_tokens, kv_tokens), split, turns, calibrated, plot,
            say_nothing if quiet else say,
        )  # fmt: skip
    show(validation.as_dict(), validation_table(validation), json)


@twin_app.command("speed")
def twin_speed(
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Trace to replay. [default: a synthetic one]")
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="Latency profile of the replicas.")
    ] = "h100-llama-3-8b-tp1-bf16",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME", help="Human arm to measure; repeatable."),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure how many requests the twin simulates per second of CPU time."""
    from autopoiesis.orchestrator.tables import speed_table
    from autopoiesis.twin import speed
    from autopoiesis.twin.latency import profile as profile_of
    from autopoiesis.twin.trace import read_trace

    with refusals():
        report = speed.measure(
            read_trace(trace) if trace else speed.conversations(speed.REQUESTS, 0),
            profile_of(profile),
            policy or speed.POLICIES,
            say_nothing if quiet else say,
        )
    show(report.as_dict(), speed_table(report), json)
