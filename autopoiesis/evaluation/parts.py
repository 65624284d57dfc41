"""Results on disk, one file per unit of work, named after all that the result depends on.

A run that was stopped goes on where it was; one whose code, scenario or budget has changed begins
anew, because the name differs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from autopoiesis import __version__
from autopoiesis.atomic import write_atomically

PACKAGE = Path(__file__).parent.parent
SOURCES = ("arms", "twin", "telemetry", "synthesis", "orchestrator", "evaluation")
"""Rooms whose code a result depends on."""
FOLDER = "parts"


@dataclass(frozen=True, slots=True)
class Part:
    """What came of one unit of work."""

    suite: str
    scenario: str
    contestant: str
    seed: int
    row: dict[str, Any]
    windows: dict[str, list[float]]
    shifts_s: list[float]
    """From the beginning of the judged part."""
    window_s: float
    decisions: dict[str, str]
    said: str
    seconds: float
    """Wall time of the unit."""


def key_of(depends_on: Mapping[str, Any]) -> str:
    """Return the name under which a result is kept: a hash of what it depends on and of the code."""
    plain = orjson.dumps(
        {"code": code_digest(), "version": __version__, **depends_on},
        option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
    )
    return hashlib.sha256(plain).hexdigest()[:20]


@cache
def code_digest() -> str:
    """Return a hash of the sources that results depend on; reports and tables are not among them."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((PACKAGE / room).rglob("*")):
            if path.suffix in {".py", ".policy", ".json"} and path.name not in PRESENTATION:
                digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()


PRESENTATION = frozenset({"report.py", "plots.py", "summary.py", "bench.py", "runner.py"})
"""Modules that show results and do not make them."""


def save(out: Path, key: str, part: Part) -> None:
    """Write a part whole or not at all."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / f"{key}.json", orjson.dumps(asdict(part), option=orjson.OPT_SERIALIZE_NUMPY)
    )


def load(out: Path, key: str) -> Part | None:
    """Read a part; None if it is not there, or was written by something else."""
    try:
        return Part(**orjson.loads((out / FOLDER / f"{key}.json").read_bytes()))
    except (OSError, orjson.JSONDecodeError, TypeError):
        return None
