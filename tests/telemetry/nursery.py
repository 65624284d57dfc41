"""Children that work on a telemetry file until they are killed. They are forked, so that fifty are soon there."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

LIMIT_S = 60.0


@dataclass
class Child:
    """One process; what it has said so far is in a file, a line each."""

    nursery: subprocess.Popen[str]
    pid: int
    said: Path

    def lines(self) -> list[str]:
        """Return the whole lines that it has said."""
        said = self.said.read_text() if self.said.exists() else ""
        return [line[:-1] for line in said.splitlines(keepends=True) if line[-1] == "\n"]

    def wait_for(self, lines: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(self.lines()) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def kill(self) -> list[str]:
        """Kill it, wait until it is gone, and return what it has said."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.nursery.stdout
        assert "gone\n" == self.nursery.stdout.readline()
        return self.lines()


class Nursery:
    """A process that has imported everything and forks a child for each line that it reads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(LIMIT_S)
        assert self._process.stdout
        self._process.stdout.close()

    def child(self, work: str, path: Path, *arguments: object) -> Child:
        """Have a child work: `write` windows for ever, or `keep` the history as of a time."""
        said = path.with_name("said")
        said.unlink(missing_ok=True)
        assert self._process.stdin
        assert self._process.stdout
        order = "\t".join(map(str, (work, path, said, *arguments)))
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return Child(self._process, int(self._process.stdout.readline()), said)


def _say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _write(path: Path) -> None:
    with Store.open(path) as store:
        _say("open")
        while True:
            window = store.last_window() + 1
            fill(store, [window])
            _say(window)


def _keep(path: Path, now_s: str) -> None:
    with Store.open(path) as store:
        _say("open")
        store.keep_history(path.parent / "history", Retention(0, 0), float(now_s))
    _say("done")
    signal.pause()


def _fork_for_ever() -> None:
    works = {"write": _write, "keep": _keep}
    for line in sys.stdin:
        work, path, said, *arguments = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
            try:
                works[work](Path(path), *arguments)
            finally:
                os._exit(1)
        _say(pid)
        os.waitpid(pid, 0)
        _say("gone")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from telemetry_rows import fill

    from autopoiesis.telemetry.store import Retention, Store

    _fork_for_ever()
