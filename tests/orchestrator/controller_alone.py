"""A controller process with its control port, without picker, Envoy and replicas."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gateway_process import wait_until

from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet

START_LIMIT_S = 170.0
PROFILE = "h100-llama-3-8b-tp1-bf16"


@dataclass
class Controlled:
    folder: Path
    settings: Settings
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.control_port}"

    def start(self) -> None:
        argv = [sys.executable, "-m", "autopoiesis.orchestrator.controller", "--run-dir"]
        with (self.folder / "controller.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, str(self.settings.run_dir)], stdout=log, stderr=log, env=dict(os.environ)
            )
        wait_until(self.answers, START_LIMIT_S)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "controller.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def controlled(folder: Path, **settings: object) -> Iterator[Controlled]:
    data_dir, (port,) = folder / ".autopoiesis", free_ports(1)
    chosen = Settings(data_dir=data_dir, control_port=port, synthesizer="none", **settings)
    chosen.run_dir.mkdir(parents=True)
    write_fleet(
        chosen.run_dir / "fleet.json",
        tuple(
            Member(name=f"r{i}", address=f"127.0.0.1:{i + 1}", profile=PROFILE, kind="simulated")
            for i in range(4)
        ),
    )
    chosen.save()
    running = Controlled(folder, chosen)
    running.start()
    try:
        yield running
    finally:
        running.kill()
