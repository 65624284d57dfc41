"""The command line. Each command reads its options, calls one room, and prints the answer."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from autopoiesis import __version__
from autopoiesis.cli_arms import arms_app
from autopoiesis.cli_bench import bench
from autopoiesis.cli_fleet import control_app
from autopoiesis.cli_options import (
    FAILED,
    WRONG_USAGE,
    Config,
    DataDir,
    FleetFile,
    Json,
    Profiles,
    Quiet,
    Seed,
    SloTpot,
    SloTtft,
    Verbose,
    Windows,
    err,
    out,
    read_settings,
    refusals,
    say,
    say_nothing,
    show,
    stop_with,
)
from autopoiesis.cli_picker import picker
from autopoiesis.cli_replay import replay
from autopoiesis.cli_synthesize import synthesize
from autopoiesis.cli_twin import twin_app

app = typer.Typer(
    name="autopoiesis",
    help="Serve a vLLM fleet through policies that compete, learn and are replaced.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
traces_app = typer.Typer(help="Traces of requests.", no_args_is_help=True)
app.add_typer(arms_app, name="arms")
app.add_typer(control_app, name="control")
app.add_typer(traces_app, name="traces")
app.add_typer(twin_app, name="twin")
app.command()(replay)
app.command()(synthesize)
app.command()(bench)
app.command()(picker)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Serve a vLLM fleet through policies that compete, learn and are replaced."""


@app.command()
def serve(
    replica: Annotated[
        list[str] | None,
        typer.Option(
            "--replica",
            metavar="URL",
            help="An OpenAI-compatible server to put behind the gateway, or dns://HOST:PORT for all "
            "addresses of a name; repeatable.",
        ),
    ] = None,
    fleet_file: FleetFile = None,
    simulate: Annotated[
        int | None,
        typer.Option(
            "--simulate", help="Simulated replicas, where no --replica is given. [default: 4]"
        ),
    ] = None,
    vllm: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start real vLLM servers of this model here (a name on the hub, or a directory); "
            "what follows -- goes to each of them.",
        ),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="vLLM replicas to start. [default: 1]")
    ] = None,
    vllm_arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM ARGUMENTS]", show_default=False)
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option(help="Interpreter that has vLLM. [default: this one]"),
    ] = None,
    profile: Profiles = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the OpenAI-compatible endpoint. [default: 8080]")
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="Certificate (PEM) with which the endpoint speaks TLS, and TLS only."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of the keys that clients need: lines of NAME KEY [PER-MINUTE]."),
    ] = None,
    control_host: Annotated[
        str | None,
        typer.Option(
            help="Address of the control API; beyond loopback it wants its token. [default: 127.0.0.1]"
        ),
    ] = None,
    control_port: Annotated[
        int | None, typer.Option(help="Port of the control API. [default: 8081]")
    ] = None,
    synthesizer: Annotated[
        str | None,
        typer.Option(
            help="Who writes new policies: genetic, openai, fleet, files or none. [default: genetic]"
        ),
    ] = None,
    window: Annotated[
        float | None, typer.Option("--window", help="Length of a window [s]. [default: 10]")
    ] = None,
    slo_ttft: SloTtft = None,
    slo_tpot: SloTpot = None,
    for_s: Annotated[
        float | None, typer.Option("--for", metavar="S", help="Stop after this many seconds.")
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    seed: Seed = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve until stopped (or for --for seconds): Envoy, the picker, the controller and the replicas."""
    from autopoiesis.orchestrator.serve import serve as run

    if sum([bool(replica or fleet_file), simulate is not None, bool(vllm)]) > 1:
        stop_with(WRONG_USAGE, "Give one of --replica, --simulate and --vllm.")
    if (vllm_arguments or replicas) and not vllm:
        stop_with(WRONG_USAGE, "--replicas and what follows -- are for vLLM; give --vllm MODEL.")
    gateway = {"tls_cert": tls_cert, "tls_key": tls_key, "api_keys": api_keys}
    given = {name: value for name, value in gateway.items() if value is not None}

    def settings() -> Any:
        return read_settings(
            config, replica=replica, fleet_file=fleet_file, simulate=simulate, vllm=vllm, replicas=replicas,
            vllm_arguments=vllm_arguments, vllm_python=vllm_python, profile=profile, host=host, port=port,
            control_host=control_host, control_port=control_port, synthesizer=synthesizer, window_s=window,
            slo_ttft_s=slo_ttft, slo_tpot_s=slo_tpot, for_s=for_s, data_dir=data_dir, seed=seed,
            gateway=given or None,
        )  # fmt: skip

    with refusals():
        run(settings(), say_nothing if quiet else say, say if verbose else say_nothing, settings)


@app.command()
def demo(
    for_s: Annotated[
        float, typer.Option("--for", metavar="S", help="Length of the demo [s].")
    ] = 120.0,
    trace: Annotated[
        Path | None, typer.Option(help="Trace to replay instead of the built-in shift of workload.")
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the live page in a browser.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Port of the OpenAI-compatible endpoint. [default: 8080]")
    ] = None,
    control_port: Annotated[
        int | None, typer.Option(help="Port of the control API. [default: 8081]")
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    seed: Seed = None,
) -> None:
    """Serve simulated replicas under a real trace, with a live view and a summary."""
    from autopoiesis.orchestrator.demo import run_demo

    with refusals():
        settings = read_settings(
            config, port=port, control_port=control_port, data_dir=data_dir, seed=seed
        )
        raise typer.Exit(run_demo(settings, trace, for_s, open_page, out))


@app.command()
def load(
    trace: Annotated[Path, typer.Argument(help="Trace to replay.")],
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible endpoint.")],
    speed: Annotated[
        float, typer.Option(min=0.001, help="Replay this many times faster than recorded.")
    ] = 1.0,
    for_s: Annotated[
        float | None, typer.Option("--for", metavar="S", help="Send for this many seconds.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Send at most this many requests.")
    ] = None,
    seed: Seed = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Replay a trace as open-loop HTTP load: requests go out at their time, answered or not."""
    from autopoiesis.gateway.load import run_load
    from autopoiesis.orchestrator.tables import load_table
    from autopoiesis.twin.trace import read_trace

    with refusals():
        summary = run_load(
            read_trace(trace), url, speed, for_s, max_requests, seed or 0, quiet or json == "-"
        )
    show(summary.as_dict(), load_table(summary), json)
    if summary.completed == 0:
        raise typer.Exit(FAILED)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT.")],
    format: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",  # noqa: A002
    max_rows: Annotated[int, typer.Option(min=1, help="Print at most this many rows.")] = 1000,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Ask the telemetry, of a running instance or of a stopped one; read-only."""
    from autopoiesis.orchestrator.catalogue import ask_telemetry
    from autopoiesis.telemetry.query import format_result

    if format not in {"table", "json", "csv"}:
        stop_with(WRONG_USAGE, f"There is no format {format!r}; give table, json or csv.")
    with refusals():
        result = ask_telemetry(read_settings(config, data_dir=data_dir), query, max_rows)
    rendered = format_result(result, format)
    if isinstance(rendered, str):
        sys.stdout.write(rendered)
    else:
        out.print(rendered)
    if result.truncated:
        err.print(f"Only the first {max_rows} rows are shown; --max-rows shows more.")


@app.command()
def report(
    target: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")
    ] = Path("report.html"),
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Begin here: ISO 8601, UTC if it says nothing else."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="End here. [default: the last window]")
    ] = None,
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for", metavar="S", min=1.0, help="The last S seconds until then. [default: 86400]"
        ),
    ] = None,
    json: Json = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Write what happened in a span of time as one HTML page, of a running instance or of a stopped one."""
    from autopoiesis.orchestrator.report_command import write_report
    from autopoiesis.orchestrator.tables import write_json

    if since and for_s:
        stop_with(WRONG_USAGE, "Give --since or --for, not both.")
    with refusals():
        made = write_report(read_settings(config, data_dir=data_dir), since, until, for_s, target)
    if json:
        write_json(made.as_dict(), json)
    if json != "-":
        out.print(made.text(), highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(json: Json = None) -> None:
    """Tell what this machine offers, what is missing, and how to get it."""
    from autopoiesis.orchestrator.doctor import examine
    from autopoiesis.orchestrator.tables import doctor_table

    findings = examine()
    show([finding.as_dict() for finding in findings], doctor_table(findings), json)
    if any(finding.needed and not finding.there for finding in findings):
        raise typer.Exit(FAILED)


@traces_app.command("info")
def traces_info(
    trace: Annotated[Path, typer.Argument(help="Trace to describe.")], json: Json = None
) -> None:
    """Describe a trace: rate, burstiness, lengths, shared prefixes; or what a capacity trace takes."""
    from autopoiesis.orchestrator.tables import pairs_table
    from autopoiesis.twin.capacity_trace import is_capacity, read_capacity
    from autopoiesis.twin.trace import read_trace

    with refusals():
        read = read_capacity if is_capacity(trace) else read_trace
        summary = asdict(read(trace).summary())
    show(summary, pairs_table(str(trace), summary), json)


@traces_app.command("import")
def traces_import(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="Mooncake JSONL, Azure CSV or BurstGPT CSV.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Parquet file to write.")],
) -> None:
    """Convert a public trace to this project's Parquet schema."""
    from autopoiesis.twin.trace import read_trace, write_trace

    with refusals():
        trace = read_trace(source)
        write_trace(trace, target)
    out.print(f"{len(trace)} requests written to {target}", highlight=False)


@traces_app.command("export")
def traces_export(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Parquet file to write.")],
    windows: Windows = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Write stored requests as a trace: lengths and salted hashes, never content."""
    from autopoiesis.orchestrator.twin_commands import export_trace

    with refusals():
        count = export_trace(read_settings(config, data_dir=data_dir), windows, target)
    out.print(f"{count} requests written to {target}", highlight=False)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
