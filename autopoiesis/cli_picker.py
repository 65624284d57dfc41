"""The command that serves as the endpoint picker of another gateway."""

from pathlib import Path
from typing import Annotated

import typer

from autopoiesis.cli_options import (
    Config,
    DataDir,
    Quiet,
    read_settings,
    refusals,
    say,
    say_nothing,
)


def picker(
    replica: Annotated[
        list[str] | None,
        typer.Option(
            "--replica", metavar="URL", help="An OpenAI-compatible server of the pool; repeatable."
        ),
    ] = None,
    arm: Annotated[
        str, typer.Option(metavar="ID|NAME|FILE.py", help="The policy by which it picks.")
    ] = "least-requests",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 9002,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate (PEM), where the gateway speaks TLS to it.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    data_dir: DataDir = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Pick endpoints for a Kubernetes inference gateway (Gateway API Inference Extension)."""
    from autopoiesis.orchestrator.picker_command import run_picker

    with refusals():
        settings = read_settings(config, replica=replica, data_dir=data_dir)
        run_picker(settings, arm, host, port, (tls_cert, tls_key), say_nothing if quiet else say)
