"""Real vLLM servers as child processes: how to start one, and what its log says."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from autopoiesis.replicas.devices import Place
from autopoiesis.replicas.fleet import Command, FleetError, Member
from autopoiesis.replicas.limits import Limits

OLDEST = (0, 8)
"""The first version whose engine is the present one: metrics, scheduling by priority and prefix cache as known here."""
OURS = frozenset({"--host", "--port", "--model"})
"""Options of vLLM that are set here."""

KV_EVENTS = "--kv-events-config"
SLEEP_MODE = "--enable-sleep-mode"
DEV_MODE = "VLLM_SERVER_DEV_MODE"
"""Variable that opens vLLM's developers' routes, those of sleep among them."""
_LIMITS = (
    ("--max-num-seqs",),
    ("--max-num-batched-tokens",),
    ("--tensor-parallel-size", "-tp"),
)
"""vLLM's names of the fields of `Limits`, in their order."""

_LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

_STAGES: tuple[tuple[str, str], ...] = (
    (r"non-default args", "reading the model's configuration"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model", "loading the weights"),
    (r"Loading weights took", "weights loaded; preparing the KV cache"),
    (r"torch\.compile|Dynamo bytecode", "compiling"),
    (r"[Cc]apturing CUDA graph", "capturing CUDA graphs"),
    (r"init engine .* took", "engine ready; starting the server"),
    (r"Application startup complete", "up"),
)
"""What a line of the log says about how far the start has come."""

_NO_MODEL = "there is no model {model}; give a local directory with a config.json, or a model's name on the hub"

_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"No module named '?vllm",
        "{python} has no vLLM; pip install 'autopoiesis[vllm]', or name another one with --vllm-python",
    ),
    (
        r"api_server\.py: error: (?P<what>.+)",
        "vLLM does not understand its arguments ({what}); correct what follows --",
    ),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|HIP out of memory",
        "out of GPU memory; use fewer replicas per GPU, a lower --gpu-memory-utilization or a smaller model",
    ),
    (
        r"Free memory on device .*? is less than desired GPU memory utilization",
        "the GPU's memory is taken already; lower --gpu-memory-utilization or free the GPU",
    ),
    (
        r"No available memory for the cache blocks",
        "no GPU memory is left for the KV cache; raise --gpu-memory-utilization or lower --max-model-len",
    ),
    (
        r"ValueError: (?P<what>To serve at least one request[^\n]*)",
        "the KV cache is too small ({what})",
    ),
    (r"Invalid repository ID or local directory specified", _NO_MODEL),
    (
        r"Repo id must be in the form|is not a valid model identifier|(?:Repository|Entry)NotFound",
        _NO_MODEL,
    ),
    (
        r"We couldn't connect to|OfflineModeIsEnabled|LocalEntryNotFoundError|Cannot find the requested files",
        "the model {model} is not on this machine and the hub cannot be reached; give a local directory",
    ),
    (
        r"GatedRepoError|gated repo|401 Client Error",
        "the model {model} needs a token of the hub; set HF_TOKEN",
    ),
    (r"[Aa]ddress already in use", "its port is taken"),
    (
        r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device",
        "vLLM found no device it can use; check the driver, or install a vLLM built for this machine",
    ),
    (
        r"driver (?:version )?(?:on your system )?is (?:too old|insufficient)",
        "the NVIDIA driver is too old for this vLLM",
    ),
    (r"Value error, (?P<what>[^\n\[]{1,300})", "{what}"),
    (r"ValueError: (?P<what>[^\n]{1,300})", "{what}"),
    (r"(?:RuntimeError|OSError|ImportError|AssertionError): (?P<what>[^\n]{1,300})", "{what}"),
)
"""What a failed start's log holds, and what it means; the first that matches counts."""
_AFTERMATH = re.compile(
    r"could cause fd limit errors|See root cause above|"
    r"Engine core initialization failed|WorkerProc initialization failed"
)


@dataclass(frozen=True, slots=True)
class Vllm:
    """What each replica serves, and with which vLLM."""

    model: str
    """Name on the hub, or a local directory."""
    arguments: tuple[str, ...] = ()
    """Further arguments for vLLM's server."""
    python: str = sys.executable
    """Interpreter that has vLLM."""

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if argument.partition("=")[0] in OURS:
                raise FleetError(
                    f"{argument.partition('=')[0]} is set here; leave it out after --."
                )

    @property
    def limits(self) -> Limits:
        """What the arguments say of the limits that a restart can change."""
        return Limits(*(self._whole(*names) for names in _LIMITS))

    @property
    def tensor_parallel(self) -> int:
        """GPUs per replica."""
        return self.limits.tensor_parallel or 1

    @property
    def can_sleep(self) -> bool:
        """Whether replicas can be put to sleep: it must be asked for at the start."""
        return SLEEP_MODE in self.arguments

    @property
    def may_publish(self) -> bool:
        """Whether it can be told where to publish its KV events: nobody else has, and one socket will do."""
        ranks = self._option("--data-parallel-size", "-dp") or "1"
        return self._option(KV_EVENTS) is None and ranks == "1"

    @property
    def api_key(self) -> str:
        """Key that its `/v1` routes want, empty for none."""
        return self._option("--api-key") or ""

    def command(self, member: Member, place: Place) -> Command:
        """Return the command that serves a member at its place, with the member's limits."""
        host, _, port = member.address.rpartition(":")
        argv = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--host", host, "--port", port, "--model", self.model, *self.arguments]
        given = self.limits
        for (option, *_), field in zip(_LIMITS, fields(Limits), strict=True):
            wanted = getattr(member.limits, field.name)
            if wanted and wanted != getattr(given, field.name):
                argv += [option, str(wanted)]  # of several, vLLM takes the last
        if member.kv_events:
            events = {"enable_kv_cache_events": True, "publisher": "zmq"}
            argv += [KV_EVENTS, json.dumps({**events, "endpoint": member.kv_events})]
        awake = {DEV_MODE: "1"} if self.can_sleep else {}
        return Command(argv, {**_LOOPBACK, **place.environment, **awake}, place.cores)

    def why_it_failed(self, log: str) -> str:
        """Return the cause of a failed start in one sentence, from what the server logged."""
        for pattern, sentence in _CAUSES:
            for found in re.finditer(pattern, log):
                line = log[log.rfind("\n", 0, found.start()) + 1 : found.end()]
                if _AFTERMATH.search(line):
                    continue
                what = {name: text.strip() for name, text in found.groupdict().items() if text}
                return sentence.format(model=self.model, python=self.python, **what)
        return "vLLM ended without saying why"

    def _whole(self, *names: str) -> int:
        value = self._option(*names)
        if value is None:
            return 0
        if not value.isdigit() or int(value) < 1:
            raise FleetError(f"{names[0]} must be a whole number above 0, not {value!r}.")
        return int(value)

    def _option(self, *names: str) -> str | None:
        for i, argument in enumerate(self.arguments):
            name, equals, value = argument.partition("=")
            if name in names:
                return (
                    value
                    if equals
                    else (self.arguments[i + 1] if i + 1 < len(self.arguments) else "")
                )
        return None


_EVENTS_ARE_THERE = """
from importlib.util import find_spec
from pathlib import Path
vllm = find_spec("vllm")
print(vllm is not None and (Path(vllm.origin).parent / "distributed" / "kv_events.py").exists())
"""
"""Does not import vLLM, which takes seconds; nor asks for its version, since builds for CPUs have other names."""


def knows_kv_events(python: str) -> bool:
    """Tell whether the vLLM of this interpreter can publish KV events; False if there is none."""
    ask = [python, "-c", _EVENTS_ARE_THERE]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return told.stdout.strip() == "True"


def too_old(version: str | None) -> bool:
    """Tell whether a vLLM of this version (as `/version` has it) is older than what is understood here."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return bool(found) and (int(found[1]), int(found[2])) < OLDEST


def stage(log: str) -> str:
    """Return how far a start has come, in a few words."""
    reached = "importing vLLM"
    for pattern, what in _STAGES:
        if re.search(pattern, log):
            reached = what
    return reached


def tail(log: Path, since: int = 0, most: int = 1 << 20) -> str:
    """Return the end of a log, from byte `since` on."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, 2)
            since = since if since <= end else 0  # it was set aside meanwhile
            file.seek(max(since, end - most))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_line(log: str) -> str:
    """Return the last line of a log that says anything."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without saying why"


def describe(places: Sequence[Place]) -> str:
    """Return where replicas run, in a few words."""
    return ", ".join(dict.fromkeys(place.what for place in places))
