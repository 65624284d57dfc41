"""Other routers, installed each in a virtual environment of its own, before the same mock replicas.

    python -m venv DIR && DIR/bin/pip install sglang-router      (or vllm-router, or 'litellm[proxy]')

They run as their packages start them by default, with one worker and logs at warnings where that can
be said; LiteLLM is told that it may serve without a key, as the others do.
"""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from gateway_stack import run_load

from autopoiesis.replicas.fleet import free_ports

START_S = 300.0


class Router(NamedTuple):
    """A router that runs."""

    name: str
    port: int
    process: subprocess.Popen[bytes]


class Start(NamedTuple):
    """What a router needs to start."""

    venv: Path
    port: int
    spare_port: int
    replicas: Sequence[str]
    folder: Path


def _sglang(start: Start) -> list[str]:
    command = [str(start.venv / "bin/python"), "-m", "sglang_router.launch_router"]
    ports = ["--port", str(start.port), "--prometheus-port", str(start.spare_port)]
    return [
        *command,
        *ports,
        "--host",
        "127.0.0.1",
        "--log-level",
        "warn",
        "--worker-urls",
        *start.replicas,
    ]


def _vllm(start: Start) -> list[str]:
    command = [str(start.venv / "bin/vllm-router")]
    ports = ["--port", str(start.port), "--prometheus-port", str(start.spare_port)]
    return [
        *command,
        *ports,
        "--host",
        "127.0.0.1",
        "--log-level",
        "warning",
        "--worker-urls",
        *start.replicas,
    ]


def _litellm(start: Start) -> list[str]:
    models = [
        {"model_name": "m", "litellm_params": {"model": "openai/m", "api_base": f"{url}/v1", "api_key": "-"}}
        for url in start.replicas
    ]  # fmt: skip
    config = start.folder / "litellm.yaml"
    keyless = {"dangerously_permit_weak_or_unset_master_key": True}
    told = {"model_list": models, "general_settings": keyless}
    config.write_text(json.dumps(told))  # JSON is YAML
    command = [str(start.venv / "bin/litellm"), "--config", str(config)]
    return [*command, "--host", "127.0.0.1", "--port", str(start.port), "--num_workers", "1"]


COMMANDS: dict[str, Callable[[Start], list[str]]] = {
    "sglang-router": _sglang,
    "vllm-router": _vllm,
    "litellm": _litellm,
}


@contextmanager
def running_routers(
    beside: Sequence[tuple[str, Path]], replicas: Sequence[str], folder: Path
) -> Iterator[list[Router]]:
    """Run routers (name, virtual environment) before replicas (`http://...`)."""
    routers: list[Router] = []
    with ExitStack() as stack:
        for name, venv in beside:
            port, spare_port = free_ports(2)
            command = COMMANDS[name](Start(venv, port, spare_port, replicas, folder))
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            routers.append(Router(name, port, process))
        yield routers


async def until_answered(router: Router, folder: Path) -> None:
    """Wait until a router passes requests on."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and router.process.poll() is None:
        try:
            if (await run_load(router.port, 1, 0.1)).latencies_s:
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit(
        f"{router.name} does not come up; see {folder / router.name}.log:\n{_end_of_log(router, folder)}"
    )


def _end_of_log(router: Router, folder: Path) -> str:
    return (folder / f"{router.name}.log").read_text(errors="replace")[-500:]
