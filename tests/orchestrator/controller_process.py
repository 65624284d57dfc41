"""A controller process with its control port, without picker, Envoy and replicas."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gateway_process import wait_until

from autopoiesis.orchestrator.control_access import read_token, write_token
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import data_directory
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet

START_LIMIT_S = 170.0
PROFILE = "h100-llama-3-8b-tp1-bf16"


@dataclass
class Controlled:
    """The process, and the way to talk to it; the data directory is `folder/.autopoiesis`."""

    folder: Path
    settings: Settings
    client: httpx.Client
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        argv = [sys.executable, "-m", "autopoiesis.orchestrator.controller", "--run-dir"]
        with (self.folder / "controller.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, str(self.settings.run_dir)], stdout=log, stderr=log, env=dict(os.environ)
            )
        wait_until(self.answers, START_LIMIT_S)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def log(self) -> str:
        return (self.folder / "controller.log").read_text()

    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {read_token(self.settings.data_dir)}"}

    def post(self, path: str, body: object = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body or {}, headers=self.bearer(), **more)

    def rows(self, query: str) -> list[list[Any]]:
        answer = self.client.post("/sql", json={"query": query})
        assert answer.status_code == 200, answer.text
        return answer.json()["rows"]


@contextmanager
def controlled(folder: Path, **settings: Any) -> Iterator[Controlled]:
    """Run a controller on a data directory of its own, held as `serve` would hold it."""
    data_dir, port = folder / ".autopoiesis", free_ports(1)[0]
    chosen = Settings(data_dir=data_dir, control_port=port, synthesizer="none", **settings)
    members = tuple(
        Member(name=f"r{i}", address=f"127.0.0.1:{i + 1}", profile=PROFILE, kind="simulated")
        for i in range(4)
    )
    with (
        data_directory(chosen),
        httpx.Client(base_url=chosen.control_url, timeout=20) as client,
    ):
        chosen.run_dir.mkdir()
        write_fleet(chosen.run_dir / "fleet.json", members)
        chosen.save()
        write_token(data_dir, chosen.control_token)
        running = Controlled(folder, chosen, client)
        running.start()
        try:
            yield running
        finally:
            running.kill()
