"""A second Envoy before the same replicas, configured as the gateway's but for one thing."""

import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import orjson
from gateway_stack import Stack

from autopoiesis.gateway import config, envoy
from autopoiesis.gateway.config import Plan
from autopoiesis.gateway.endpoints import write_endpoints
from autopoiesis.gateway.models import Fleet
from autopoiesis.gateway.resource import Config
from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.fleet import free_ports

Alter = Callable[[Config, list[Config]], None]
"""Changes the HTTP connection manager and the clusters in place."""


class SecondEnvoy(NamedTuple):
    """An Envoy that runs."""

    port: int
    pid: int


def headers_at_once(_: Config, clusters: list[Config]) -> None:
    """Let the headers of an answer go on before its first byte."""
    for cluster in clusters:
        for protocol in cluster["typed_extension_protocol_options"].values():
            protocol.pop("http_filters", None)


@contextmanager
def running_envoy(name: str, folder: Path, stack: Stack, alter: Alter) -> Iterator[SecondEnvoy]:
    """Run an Envoy that asks a stack's picker and sends to its replicas."""
    run_dir = RunDir(folder / name)
    run_dir.path.mkdir()
    (port,) = free_ports(1)
    plan = Plan("127.0.0.1", port, stack.settings, run_dir, (Fleet(run_dir),))
    write_endpoints(run_dir, stack.members)
    run_dir.picker_socket.symlink_to(RunDir(stack.run_dir).picker_socket)
    run_dir.certificate.write_bytes(orjson.dumps(config.secrets(plan)))
    listeners, clusters = config.listeners(plan), config.clusters(plan)
    (listener,) = listeners["resources"]
    (manager,) = listener["filter_chains"][0]["filters"]
    alter(manager["typed_config"], clusters["resources"])
    run_dir.listeners.write_bytes(orjson.dumps(listeners))
    run_dir.clusters.write_bytes(orjson.dumps(clusters))
    run_dir.envoy_config.write_bytes(orjson.dumps(config.bootstrap(plan)))
    log_file = folder / f"{name}.log"
    with log_file.open("wb") as log:
        argv = envoy.arguments(run_dir.envoy_config, stack.settings)
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        _until_ready(port, log_file)
        yield SecondEnvoy(port, process.pid)
    finally:
        process.kill()
        process.wait()


def _until_ready(port: int, log_file: Path) -> None:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"The second Envoy does not come up; see {log_file}.")
