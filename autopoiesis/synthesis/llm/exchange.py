"""Every exchange with a model as a line of JSON, and the way back: a cycle can be run again from it.

A file holds one cycle: its brief, its exchanges in order, and how it ended. No key, no header and no
client's content is ever in it.
"""

import base64
import secrets
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.synthesis.brief import Brief, BriefError
from autopoiesis.synthesis.llm.conversation import Ask, Fault, Reply, Verdict
from autopoiesis.synthesis.llm.ledger import BudgetError

VERSION = 1


class Recorder:
    """Writes the exchanges of one cycle, and keeps the folder within its size."""

    def __init__(self, folder: Path, name: str, most_bytes: int) -> None:
        """Prepare to write `name`.jsonl; nothing is written before `begin`."""
        self.path = folder / f"{name}.jsonl"
        self._most_bytes = most_bytes
        self._fault = ""

    def begin(self, brief: bytes, synthesizer: str) -> None:
        """Write down what the cycle was asked, a serialised brief."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._fault = str(error.strerror)
        packed = base64.b64encode(zlib.compress(brief)).decode()
        self.add({"kind": "cycle", "version": VERSION, "synthesizer": synthesizer, "brief": packed})

    def add(self, line: dict[str, Any]) -> None:
        """Write a line; what cannot be written makes `check_room` refuse further questions."""
        try:
            with self.path.open("ab") as file:
                file.write(orjson.dumps(line) + b"\n")
            self._make_room()
        except OSError as error:
            self._fault = str(error.strerror)

    def check_room(self) -> None:
        """Raise BudgetError where the next exchange could not be recorded."""
        if self._fault:
            raise BudgetError(
                f"Exchanges cannot be recorded in {self.path} ({self._fault}), so nobody is asked; make it writable."
            )
        if self.path.exists() and self.path.stat().st_size > self._most_bytes:
            raise BudgetError(
                f"The exchanges of this cycle fill {self._most_bytes >> 20} MiB; allow more with llm.exchanges_mib."
            )

    def _make_room(self) -> None:
        """Delete the oldest files until the folder is within its size; this cycle's stays."""
        files = sorted(self.path.parent.glob("*.jsonl"))
        sizes = {path: path.stat().st_size for path in files}
        for path in files:
            if sum(sizes.values()) <= self._most_bytes:
                break
            if path != self.path:
                path.unlink(missing_ok=True)
                del sizes[path]


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded cycle."""

    brief: Brief
    exchanges: tuple[tuple[Ask, Reply], ...]
    end: dict[str, Any] | None
    """How it ended; None if it was killed."""

    @property
    def stops(self) -> tuple[int, ...]:
        """The looks at the clock at which time was up."""
        return tuple(self.end["stops"]) if self.end else ()


def read_recording(path: Path) -> Recording:
    """Read a file of exchanges. Raises BriefError with one sentence if it is none."""
    try:
        lines: list[dict[str, Any]] = [
            orjson.loads(line) for line in path.read_bytes().splitlines()
        ]
        first, *others = lines
        if first["kind"] != "cycle" or first["version"] != VERSION:
            raise ValueError(f"version {first['version']} of a {first['kind']}")
        brief = Brief.from_bytes(zlib.decompress(base64.b64decode(first["brief"])))
        exchanges = [line for line in others if line["kind"] == "exchange"]
        ends = [line for line in others if line["kind"] == "end"]
        return Recording(
            brief,
            tuple((Ask.of(line["ask"]), Reply.of(line["reply"])) for line in exchanges),
            ends[-1] if ends else None,
        )
    except OSError as error:
        raise BriefError(f"Cannot read the exchanges {path}: {error.strerror}.") from None
    except BriefError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise BriefError(
            f"{path} holds no recorded exchanges ({type(error).__name__}: {error}); pass a file from "
            "the folder synthesis/exchanges of a data directory."
        ) from None


class Replayed:
    """Gives recorded replies, in order."""

    def __init__(self, recording: Recording) -> None:
        self._left = list(recording.exchanges)
        self.differing = 0
        """Questions that were not those of the recording."""

    def ask(self, ask: Ask, within_s: float) -> Reply:
        """Return the next recorded reply."""
        del within_s
        if not self._left:
            return Reply(fault=Fault.GONE, reason="The recording has no further replies.")
        asked, reply = self._left.pop(0)
        self.differing += asked != ask
        return reply

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Nothing is learnt from a repetition."""


def cycle_name(now_s: float) -> str:
    """Return a name for a cycle's file; names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now_s))}-{secrets.token_hex(4)}"
