"""A child process that is kept alive, logs to a file, and never outlives its parent."""

import asyncio
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 10.0
"""Wait before a restart: doubled after each early death, reset once it has lived for a while."""
LIVED_S = 20.0
LOG_BYTES = 4 << 20
"""A log longer than this is set aside as `.1`."""
LOG_LOOK_S = 20.0
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """Runs `argv` again whenever it ends, with back-off, until it is stopped."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        on_exit: Callable[[str, int], None] = lambda _name, _code: None,
    ) -> None:
        """Prepare; nothing runs before `start`. `on_exit(name, code)` is told of unexpected ends."""
        self.name = name
        self.restarts = 0
        self.deaths = 0
        """How often it has ended without having been stopped."""
        self.log = log
        self.change(argv, environment)
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._log_bound: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    def change(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        """Run this from the next start on, on these cores if any are named (Linux)."""
        self._argv = list(argv)
        self._cores = tuple(cores)
        self._environment = {**os.environ, **(environment or {})}

    async def start(self) -> None:
        """Start the process, again after a `stop`, and keep it running; OSError if it cannot be started at all."""
        self._stopping = False
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        self._log_bound = asyncio.create_task(self._bound_log(), name=f"log of {self.name}")

    async def stop(self, grace_s: float) -> None:
        """Send SIGTERM, wait, and kill what is left."""
        self._stopping = True
        for task in (self._keeper, self._log_bound):
            if task:
                task.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            process.kill()
            await process.wait()
        _kill_group(process.pid)

    def last_words(self, lines: int = 5) -> str:
        """Return the end of its log, to explain a failed start."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])

    async def _spawn(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=self._begin,
            )

    def _begin(self) -> None:
        """Run in the new process, before it becomes the program."""
        die_with_parent()
        if self._cores and sys.platform == "linux":
            with suppress(OSError):  # cores that are gone by now: any will do
                os.sched_setaffinity(0, self._cores)

    async def _keep(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping and self._process is not None:
            born = clock()
            code = await self._process.wait()
            _kill_group(self._process.pid)
            if self._stopping:
                return
            self.deaths += 1
            self._on_exit(self.name, code)
            if clock() - born > LIVED_S:
                backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
            self.restarts += 1
            await self._spawn()

    async def _bound_log(self) -> None:
        """Set a long log aside while its process writes on: it appends, so the file can be emptied under it."""
        while True:
            with suppress(OSError):  # a full disk, say: the next look may do better
                if self.log.stat().st_size > LOG_BYTES:
                    shutil.copyfile(self.log, self.log.with_suffix(self.log.suffix + ".1"))
                    os.truncate(self.log, 0)
            await asyncio.sleep(LOG_LOOK_S)


def told_of_exit(name: str, code: int, log: Path) -> str:
    """Return what an operator should know of a child that ended by itself."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"{name} {how}; it is started again (log: {log})"


def _kill_group(leader: int) -> None:
    """Kill what a process that has ended left behind of its group: workers of a server, for one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
