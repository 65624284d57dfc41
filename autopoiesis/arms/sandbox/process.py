"""The parent's end of a slow policy's process: start it, ask it, measure it, end it."""

import importlib.util
import marshal
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.arms.sandbox.isolation import Isolation

if sys.platform == "linux":
    from resource import RLIM_INFINITY, RLIMIT_CPU, prlimit

_CHILD = str(Path(__file__).with_name("child.py"))
_LIBRARIES = ("numpy", "scipy")
_AWAKE_S = 200e-6
"""An answer that comes within this is not slept for: being woken up would take longer than the answer."""
_SPARE_CPU_S = 1
"""CPU time beyond its deadline after which the kernel ends a process, should the parent be gone."""


class SlowFault(Exception):  # noqa: N818 - what a policy does wrong is no error of ours
    """A slow policy failed, or answered what cannot be used. The message is one sentence."""

    wall_s: float = 0.0
    """Time that it took to find out [s]."""
    cpu_s: float = 0.0
    """CPU time that the policy took meanwhile [s]."""


class SandboxError(RuntimeError):
    """Slow policies cannot be run here. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a slow policy may use."""

    memory_bytes: int = 1 << 30
    """Address space of its process."""
    start_s: float = 30.0
    """Time to start the process, load libraries, and run the policy's top level."""
    trigger_s: float = 1.0
    """Time for one `should_reschedule`."""
    planner_s: float = 20.0
    """Time for one `schedule`."""
    answer_bytes: int = 128 << 10
    """Size of one answer."""


class SandboxProcess:
    """One process, shut off, with one policy loaded. Not for use by several threads at once."""

    def __init__(
        self, source: str, modules: tuple[str, ...], bounds: Bounds, least: Isolation
    ) -> None:
        """Start it and load the policy.

        Raises:
            SandboxError: it could not be started, or is held back less than `least`.
            SlowFault: the policy could not be loaded.
        """
        self._bounds = bounds
        self._process = _spawn()
        assert self._process.stdin and self._process.stdout  # noqa: PT018 - pipes were asked for
        self._requests = self._process.stdin.fileno()
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._ended, self._said = False, ""
        self._cpu_before_s = self._cpu_at_end_s = 0.0
        try:
            self.isolation, self.lacking = self._shut_off(modules, least)
            self._send(source, time.monotonic() + bounds.start_s)
            self._expect("loaded", self._receive(time.monotonic() + bounds.start_s))
        except BaseException:
            self.kill()
            raise

    def ask(self, function: str, arguments: tuple[object, ...], deadline_s: float) -> object:
        """Call one of the policy's functions and return its answer, unchecked but for being JSON.

        Arguments are window, fleet and plan as plain values; fleet and plan may be None for the same as
        in the last call. Raises SlowFault; where the process cannot be trusted to go on, it is ended first.
        """
        end = time.monotonic() + deadline_s
        sequence = secrets.randbits(53)  # not to be guessed: no answer can be prepared
        self._nothing_unasked()
        self._send((sequence, function, *arguments), end)
        self._limit_cpu(deadline_s)  # while it wakes up
        answer = self._receive(end)
        if answer.get("sequence") != sequence:
            raise self._end("It answered a question that was not asked.")
        return self._expect("answer", answer)

    def cpu_s(self) -> float:
        """Return the CPU time that the process used since this was last asked [s], as the kernel has it."""
        now = self._cpu_at_end_s if self._ended else _cpu_s(self._process.pid)
        used, self._cpu_before_s = now - self._cpu_before_s, now
        return used

    @property
    def ended(self) -> bool:
        """Whether the process was ended; it answers nothing more."""
        return self._ended

    def kill(self) -> None:
        """End the process and whatever it may have started."""
        if self._ended:
            return
        self._ended, self._cpu_at_end_s = True, _cpu_s(self._process.pid)
        with suppress(ProcessLookupError, PermissionError):
            # It was not waited for yet, so the id is still its own.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said = self._last_words()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    # --- starting ---

    def _shut_off(self, modules: tuple[str, ...], least: Isolation) -> tuple[Isolation, str]:
        end = time.monotonic() + self._bounds.start_s
        start = {"modules": modules, "memory_bytes": self._bounds.memory_bytes} | _libraries(
            modules
        )
        try:
            self._send(start, end)
            told = self._receive(end)
        except SlowFault as error:
            raise SandboxError(f"The sandbox did not start: {error} {self._said}".strip()) from None
        if "fault" in told:
            raise SandboxError(f"The sandbox did not start: {told['fault']}")
        isolation = Isolation(told["isolation"])
        if isolation.level < least.level:
            raise SandboxError(
                f"This machine isolates a slow policy by {isolation} only, {least} is needed "
                f"({told['lacking']}); run on Linux 5.13 or newer with Landlock and seccomp, or allow "
                "slow policies without a sandbox"
            )
        return isolation, str(told["lacking"])

    def _last_words(self) -> str:
        """Return the last line on stderr, which leads nowhere once the process is shut off."""
        assert self._process.stderr
        os.set_blocking(self._process.stderr.fileno(), False)
        try:
            words = os.read(self._process.stderr.fileno(), 4096).decode(errors="replace")
        except OSError:
            return ""
        return next((line for line in reversed(words.split("\n")) if line.strip()), "")

    # --- one request there, one line back ---

    def _limit_cpu(self, deadline_s: float) -> None:
        """Let the kernel end the process some CPU time after its deadline."""
        if sys.platform == "linux":
            most = int(_cpu_s(self._process.pid) + deadline_s) + _SPARE_CPU_S
            with suppress(OSError, ValueError):  # it may have ended
                _, hard = prlimit(self._process.pid, RLIMIT_CPU)
                most = most if hard == RLIM_INFINITY else min(most, hard)
                prlimit(self._process.pid, RLIMIT_CPU, (most, hard))

    def _nothing_unasked(self) -> None:
        try:
            told = os.read(self._answers, 1)
        except BlockingIOError:
            return
        raise self._end("It answered without being asked." if told else "")

    def _send(self, request: Any, end: float) -> None:
        data = marshal.dumps(request)
        data = len(data).to_bytes(4, "little") + data
        while data:
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                if not _ready(self._requests, select.POLLOUT, end):
                    raise self._end("It did not read its request in time.") from None
            except BrokenPipeError:
                raise self._end("") from None

    def _receive(self, end: float) -> dict[str, Any]:
        line, awake_until = b"", time.monotonic() + _AWAKE_S
        while not line.endswith(b"\n"):
            try:
                piece = os.read(self._answers, 65536)
            except BlockingIOError:
                if time.monotonic() < awake_until:
                    os.sched_yield()
                elif not _ready(self._answers, select.POLLIN, end):
                    raise self._end("It did not answer in time.") from None
                continue
            if not piece:
                raise self._end("")
            line += piece
            if len(line) > self._bounds.answer_bytes:
                raise self._end(f"Its answer has over {self._bounds.answer_bytes} bytes.")
        try:
            told = orjson.loads(line)
        except orjson.JSONDecodeError:
            told = None
        if not isinstance(told, dict):
            raise self._end("Its answer is not one JSON object.")
        return told

    def _expect(self, key: str, told: dict[str, Any]) -> object:
        if key in told:
            return told[key]
        fault = told.get("fault")
        if not isinstance(fault, str):
            raise self._end("Its answer lacks what was asked for.")
        raise SlowFault(f"It failed: {ascii(' '.join(fault.split())[:400])[1:-1]}")

    def _end(self, why: str) -> SlowFault:
        """End the process; return the fault to raise. Without a reason, its end of a pipe was closed."""
        self.kill()  # one that is ending keeps its own exit code
        return SlowFault(why or f"Its process ended {_how(self._process.returncode)}.")


def probe() -> tuple[Isolation, str]:
    """Tell how well a process can be shut off on this machine, by doing it; and what is lacking."""
    try:
        process = SandboxProcess("", (), Bounds(), Isolation.NONE)
    except (SandboxError, SlowFault) as error:
        return Isolation.NONE, str(error)
    process.kill()
    return process.isolation, process.lacking


def _spawn() -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise SandboxError("There is no Python interpreter to start; set sys.executable")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={},
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"The sandbox could not be started: {error}") from error


def _libraries(modules: tuple[str, ...]) -> dict[str, list[str]]:
    """Return where the libraries among the modules are, and what must stay readable for them."""
    paths: set[str] = set()
    readable: list[str] = []
    for library in _LIBRARIES:
        if any(module.partition(".")[0] == library for module in modules) or (
            library == "numpy" and any(module.startswith("scipy") for module in modules)
        ):
            spec = importlib.util.find_spec(library)
            if spec is None or not spec.submodule_search_locations:
                raise SandboxError(f"{library} is not installed; pip install {library}")
            folder = Path(next(iter(spec.submodule_search_locations)))
            paths.add(str(folder.parent))
            readable += [str(folder), str(folder.with_name(f"{library}.libs"))]
    return {"paths": sorted(paths), "readable": readable}


def _ready(fd: int, event: int, end: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(end - time.monotonic(), 0.0) * 1000.0))


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process [s]: its CPU clock, of which Linux makes the id from the pid."""
    if sys.platform != "linux":
        return time.monotonic()  # no such clock: what passed is the most it can have used
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by signal {signal.Signals(-code).name}"
    return f"with code {code}"
