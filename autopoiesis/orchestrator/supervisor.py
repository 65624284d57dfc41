"""Starts a gateway and all its processes, keeps them running, and takes them down again.

This process holds no telemetry and routes nothing, so there is little in it that can fail: Envoy,
the picker, the controller and the simulated replicas are children, restarted with back-off.
"""

import asyncio
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from autopoiesis.gateway import envoy
from autopoiesis.gateway.endpoints import write_endpoints
from autopoiesis.gateway.files import read_or_create_secret
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir
from autopoiesis.orchestrator.child import Child, told_of_exit
from autopoiesis.orchestrator.control_access import write_token
from autopoiesis.orchestrator.discovery import Discovery
from autopoiesis.orchestrator.first_fleet import simulated_replicas
from autopoiesis.orchestrator.follower import Follower, reconfiguration
from autopoiesis.orchestrator.local_replica import LocalReplica, ReplicaFailedError
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.startup import CannotStartError, check_port, until_up
from autopoiesis.orchestrator.vllm_fleet import bring_up
from autopoiesis.replicas.devices import PlacementError
from autopoiesis.replicas.fleet import FleetError, Member
from autopoiesis.replicas.roster import Roster
from autopoiesis.replicas.targets import ChangeLog, TargetFile
from autopoiesis.telemetry.store import Store

LONGEST_RUN_DIR = 90
"""Longest run directory in which a Unix socket's path still fits (the kernel allows 108 bytes)."""
START_LIMIT_S = 900.0
"""Longest start: the first one on a machine compiles the decision and twin kernels."""
STOP_GRACE_S = 5.0
GIVING_BACK = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}
"""glibc's settings for the controller, unless others are set: without them its heap, full of holes where the
arrays of replays were, grew by some 200 MiB an hour of which it used nothing."""

Say = Callable[[str], None]


class Supervisor:
    """One running gateway: `start`, then `stop` in any case."""

    def __init__(
        self,
        settings: Settings,
        say: Say,
        detail: Say = lambda _line: None,
        has_envoy: bool = True,
        simulated_model: str | None = None,
    ) -> None:
        """Prepare; `say` is told one line for everything an operator should know, `detail` the rest.

        Without an Envoy of its own it is behind somebody else's. Simulated replicas serve `simulated_model`.
        """
        self.settings = settings
        self._has_envoy = has_envoy
        self._simulated_model = simulated_model
        self.members: tuple[Member, ...] = ()
        self.say = say
        self._detail = detail
        self._children: list[Child] = []
        self._local: tuple[LocalReplica, ...] = ()
        """The replicas whose processes are ours."""
        self._discovery: Discovery | None = None
        self._following: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients, without `/v1`."""
        host = self.settings.host
        scheme = "https" if self.settings.gateway.tls_cert else "http"
        return (
            f"{scheme}://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{self.settings.port}"  # noqa: S104
        )

    @property
    def control_url(self) -> str:
        """Base URL of the control API."""
        return self.settings.control_url

    async def start(self) -> None:
        """Start everything and return once the gateway answers.

        Raises:
            CannotStartError: something is missing or taken, or a process does not come up.
            TelemetryError: the telemetry that is there cannot be used.
        """
        settings = self.settings
        run_dir = settings.run_dir.resolve()
        if self._has_envoy:
            check_port(settings.host, settings.port, "--port")
            await self._check_gateway()
        check_port(settings.control_host, settings.control_port, "--control-port")
        await asyncio.to_thread(_check_telemetry, settings.telemetry_file)
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        (settings.data_dir / "logs").mkdir(exist_ok=True)
        self.members = await self._fleet()
        roster = Roster(RunDir(run_dir).fleet, self.members)
        settings.save()
        write_token(settings.data_dir, settings.control_token)
        self._bring_salt(run_dir)
        await self._start_children(run_dir)
        await self._until_up()
        self._follow(roster)

    async def stop(self) -> None:
        """Drain, then stop every child and remove the run directory."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        by_name = {child.name: child for child in self._children}
        if "envoy" in by_name and by_name["envoy"].pid is not None:
            await envoy.drain(self.settings.run_dir.resolve(), self.settings.drain_s)
        for name in ("envoy", "controller", "picker"):
            if name in by_name:
                await by_name.pop(name).stop(STOP_GRACE_S)
        await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in by_name.values()))
        self._children.clear()
        shutil.rmtree(self.settings.run_dir, ignore_errors=True)

    async def change_gateway(self, gateway: DataPlaneSettings) -> None:
        """Serve new requests by other settings of the gateway; EnvoyError tells why not."""
        settings = self.settings
        where = (settings.run_dir.resolve(), settings.host, settings.port)
        await asyncio.to_thread(envoy.change, *where, gateway)
        self.settings = settings.model_copy(update={"gateway": gateway})

    async def _check_gateway(self) -> None:
        settings = self.settings
        try:
            await asyncio.to_thread(envoy.validate, settings.host, settings.port, settings.gateway)
        except envoy.EnvoyError as error:
            raise CannotStartError(str(error)) from None

    async def _fleet(self) -> tuple[Member, ...]:
        """Return who is in the fleet; real servers that run here are up then, simulated ones not yet."""
        settings = self.settings
        if settings.vllm:
            self._local = await self._vllm_fleet()
        elif settings.replica or settings.fleet_file:
            self._discovery = Discovery(settings, self.say)
            return await self._discovery.first()
        else:
            self._local = simulated_replicas(settings, self._new_child, self._simulated_model)
        return tuple(replica.member for replica in self._local)

    async def _vllm_fleet(self) -> tuple[LocalReplica, ...]:
        try:
            up = await bring_up(self.settings, self._new_child, self.say)
        except (ReplicaFailedError, PlacementError, FleetError) as error:
            raise CannotStartError(str(error)) from None
        changes = ChangeLog(RunDir(self.settings.run_dir.resolve()).changes)
        for replica, began_s, started in up:
            changes.append(reconfiguration(replica, "start", began_s, started.seconds, started))
        return tuple(one.replica for one in up)

    def _bring_salt(self, run_dir: Path) -> None:
        """Let hashes of sessions and prompts stay comparable from one start to the next."""
        salt = self.settings.data_dir / "salt"
        read_or_create_secret(salt)
        shutil.copy2(salt, RunDir(run_dir).salt)

    async def _start_children(self, run_dir: Path) -> None:
        for replica in self._local:
            if replica.member.kind == "simulated":
                await replica.begin()
        module = [sys.executable, "-m"]
        await self._start(
            "picker", [*module, "autopoiesis.gateway.picker", "--run-dir", str(run_dir)]
        )
        await self._start(
            "controller",
            [*module, "autopoiesis.orchestrator.controller", "--run-dir", str(run_dir)],
            {name: os.environ.get(name, value) for name, value in GIVING_BACK.items()},
        )
        if self._has_envoy:
            settings = self.settings
            where = (run_dir, settings.host, settings.port)
            await self._start("envoy", envoy.prepare(*where, self.members, settings.gateway))
        else:
            write_endpoints(RunDir(run_dir), self.members)

    async def _start(
        self, name: str, argv: list[str], environment: Mapping[str, str] | None = None
    ) -> None:
        child = self._new_child(name)
        child.change(argv, environment)
        await child.start()
        self._detail(f"started {name} (process {child.pid}, log {child.log})")

    def _new_child(self, name: str) -> Child:
        log = self.settings.data_dir / "logs" / f"{name}.log"
        child = Child(name, [], log, on_exit=self._on_exit)
        self._children.append(child)
        return child

    def _follow(self, roster: Roster) -> None:
        """Let the fleet change: by plans and orders what runs here, by discovery what does not."""
        run_dir = RunDir(self.settings.run_dir.resolve())
        follower = Follower(
            self._local,
            TargetFile(run_dir.targets),
            ChangeLog(run_dir.changes),
            roster,
            self.say,
        )
        beside = [follower.run()] + ([self._discovery.run(roster)] if self._discovery else [])
        self._following = [asyncio.create_task(task) for task in beside]

    def _on_exit(self, name: str, code: int) -> None:
        self.say(told_of_exit(name, code, self.settings.data_dir / "logs" / f"{name}.log"))

    async def _until_up(self) -> None:
        child = {child.name: child for child in self._children}
        signs: dict[str | Path, Child] = {
            f"{self.control_url}/health": child["controller"],
            RunDir(self.settings.run_dir).picker_socket: child["picker"],
        }
        if self._has_envoy:
            signs[f"{self.url}/v1/models"] = child["envoy"]
        await until_up(signs, self._children, START_LIMIT_S)


@contextmanager
def data_directory(settings: Settings) -> Generator[None]:
    """Hold the data directory for one instance; raise `CannotStartError` if it cannot be had."""
    directory = settings.data_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+b")
    except OSError as error:
        raise CannotStartError(
            f"Cannot use the data directory {directory}: {error.strerror}; give another one with --data-dir."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read().decode(errors="replace").strip() or "unknown"
            raise CannotStartError(
                f"The data directory {directory} belongs to a running instance (process {pid}); "
                "stop that one or give another directory with --data-dir."
            ) from None
        if len(str(settings.run_dir.resolve())) > LONGEST_RUN_DIR:
            raise CannotStartError(
                f"The path of the data directory {directory.resolve()} is too long for Unix sockets; "
                "give a shorter one with --data-dir."
            )
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield


def running_control_url(data_dir: Path) -> str | None:
    """Return the control URL of the instance that holds this data directory, None if none runs."""
    try:
        with (data_dir / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        try:
            return Settings.of_running(data_dir / "run").control_url
        except (OSError, ValueError):
            return None


def _check_telemetry(file: Path) -> None:
    """Open the file as the controller will: what is wrong with it is told at once, and only once."""
    if file.exists():
        Store.open(file).close()
