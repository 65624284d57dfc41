"""The fleet: who is in it, where, and how to start those that are simulated here."""

import re
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.replicas.limits import Limits

_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")


class FleetError(ValueError):
    """A member or a fleet file is wrong; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica of the fleet."""

    name: str
    address: str
    """host:port"""
    profile: str
    """Latency profile by which the twin simulates it."""
    speed: float = 1.0
    """Its speed relative to the profile (1 = equal)."""
    kind: Literal["simulated", "remote", "vllm"] = "simulated"
    """`vllm`: a real server that is started here."""
    kv_tokens: int = 0
    """Tokens that its KV cache holds; 0 where nobody knows yet."""
    start_s: float = 0.0
    """How long its start took; 0 where it was not started here."""
    max_num_seqs: int = 0
    """Requests that it computes at once; 0: as its profile says."""
    max_num_batched_tokens: int = 0
    """Tokens that it computes in one step; 0: as its profile says."""
    tensor_parallel: int = 0
    """GPUs that it spans; 0: as its profile says."""
    sleeps: bool = False
    """Whether it can be put to sleep."""
    serves: bool = True
    """Whether it may be sent requests: not while it is off, asleep or coming up."""
    leaving: bool = False
    """It is about to be lost: it finishes what it has, and gets nothing new."""
    kv_events: str = ""
    """ZMQ endpoint where it publishes the events of its KV cache; empty for none."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise FleetError(f"{self.name!r} is no name for a replica; use letters, digits, . _ -")
        found = _ADDRESS.fullmatch(self.address)
        if not found or not 0 < int(found[1]) < 65536:
            raise FleetError(f"{self.name}: {self.address!r} is no address; give host:port")
        if not 0.0 < self.speed < 1e6:
            raise FleetError(f"{self.name}: its speed must be above 0, not {self.speed}")
        if self.kind not in {"simulated", "remote", "vllm"}:
            raise FleetError(
                f"{self.name}: its kind must be simulated, remote or vllm, not {self.kind!r}"
            )
        for field in ("kv_tokens", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel"):
            if getattr(self, field) < 0:
                raise FleetError(
                    f"{self.name}: {field} must not be negative ({getattr(self, field)})"
                )

    @property
    def limits(self) -> Limits:
        """What it may do at once."""
        return Limits(self.max_num_seqs, self.max_num_batched_tokens, self.tensor_parallel)

    @property
    def url(self) -> str:
        """Base URL, without `/v1`."""
        return f"http://{self.address}"


def write_fleet(path: Path, members: Sequence[Member]) -> None:
    """Write the fleet file whole or not at all: a reader sees the old one or the new one."""
    _check_distinct(members)
    data = orjson.dumps([asdict(member) for member in members], option=orjson.OPT_INDENT_2)
    write_atomically(path, data, durable=True)


def read_fleet(path: Path) -> tuple[Member, ...]:
    """Read the fleet file; raise `FleetError` if it is missing or not a fleet."""
    try:
        rows: Any = orjson.loads(path.read_bytes())
    except OSError as error:
        raise FleetError(f"{path}: cannot be read ({error.strerror})") from None
    except orjson.JSONDecodeError as error:
        raise FleetError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(rows, list):
        raise FleetError(f"{path}: must hold a list of replicas")
    try:
        members = tuple(Member(**row) for row in cast("list[dict[str, Any]]", rows))
    except (TypeError, AttributeError) as error:
        raise FleetError(f"{path}: a replica in it is not understood ({error})") from None
    _check_distinct(members)
    return members


def _check_distinct(members: Sequence[Member]) -> None:
    for field in ("name", "address"):
        seen: set[str] = set()
        for member in members:
            value = getattr(member, field)
            if value in seen:
                raise FleetError(f"two replicas have the {field} {value}; each needs its own")
            seen.add(value)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return distinct TCP ports that are free now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((host, 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a child process."""

    argv: list[str]
    environment: dict[str, str]
    """Variables on top of the parent's."""
    cores: tuple[int, ...] = ()
    """Cores that all of its processes keep to; none where any will do."""


def simulated_command(member: Member, seed: int = 0, model: str | None = None) -> Command:
    """Return the command that serves a simulated member, under the model name given, if any."""
    host, _, port = member.address.rpartition(":")
    argv = [sys.executable, "-m", "autopoiesis.replicas.simulated"]
    argv += ["--name", member.name, "--host", host.strip("[]"), "--port", port]
    argv += ["--profile", member.profile, "--speed", repr(member.speed), "--seed", str(seed)]
    argv += ["--model", model] if model else []
    for option in ("max_num_seqs", "max_num_batched_tokens"):
        if value := getattr(member, option):
            argv += [f"--{option.replace('_', '-')}", str(value)]
    # One engine step is a handful of requests: compiling it would cost more than it ever saves.
    return Command(
        argv, {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    )
