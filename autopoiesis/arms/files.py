"""Arms as files: any policy a person drops in, and whole registries carried elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopoiesis.arms.arm import Arm, Origin, State, arm_id
from autopoiesis.arms.language import PolicyError, thought_of, verify
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.slow import SlowPolicy, verify_slow
from autopoiesis.atomic import write_atomically

SUFFIXES = frozenset({".py", ".policy"})
"""Of files that hold policies."""
SLOW_SUFFIX = ".plan.py"
"""Of files that hold slow functions: an arm's own, or those of the arm in the file beside it."""
_HEADER = "# arm: "
_LARGEST_FILE = 1 << 20
"""Bytes read of a file; header, thought and policy are far smaller."""
_LONGEST_NAME = 100


def arm_from_source(
    source: str | bytes,
    *,
    name: str,
    origin: Origin,
    state: State,
    created_at: float,
    parents: tuple[str, ...] = (),
    reason: str = "",
    thought: str = "",
    slow: str | bytes = "",
    prompt: str = "",
    answer: str = "",
) -> Arm:
    """Make an arm of the source of its functions; raises PolicyError.

    Slow functions stand in `source` beside the fast ones, or alone in `slow`; either kind may be
    missing. Without a `thought`, what the source says at its head is taken.
    """
    text = _text(source) or _text(slow)
    if not slow:
        source, slow = parts_of(source)
    return verified(
        Arm(
            id="",
            name=name,
            origin=origin,
            state=state,
            source=_text(source),
            created_at=created_at,
            parents=parents,
            reason=reason,
            thought=thought or thought_of(text),
            slow=_text(slow),
            prompt=prompt,
            answer=answer,
        )
    )


def verified(arm: Arm) -> Arm:
    """Verify the arm's sources; return it with both in their normal form and the id that they have.

    An arm without a name is called by its id. Raises PolicyError.
    """
    slow = _slow(arm.slow)
    fast = verify(arm.source) if arm.source or slow is None else None
    id_ = arm_id(fast.id if fast else "", slow.id if slow else "")
    return replace(
        arm,
        id=id_,
        name=arm.name or id_,
        source=fast.source if fast else "",
        slow=slow.source if slow else "",
    )


def _text(source: str | bytes) -> str:
    return source if isinstance(source, str) else source.decode("latin-1")


def _slow(source: str) -> SlowPolicy | None:
    if not source:
        return None
    try:
        return verify_slow(source)
    except PolicyError as error:
        raise PolicyError(f"slow functions: {error}") from None


def read_arm(path: Path, now_s: float) -> Arm:
    """Read an arm from a policy file, as a candidate.

    A file that `write_arm` wrote brings its name, origin, parents and age, and its reason tells how
    far it had come there; any other is named after the file. A file whose name ends in `.plan.py` holds
    slow functions alone; where one stands beside a file, it holds that arm's. Raises PolicyError (also
    for a header that does not fit) and OSError.
    """
    source, slow = _read(path), b""
    beside = path.with_suffix(SLOW_SUFFIX)
    is_slow = path.name.endswith(SLOW_SUFFIX)
    if not is_slow and beside.is_file():
        slow = _read(beside)
    first, _, rest = source.partition(b"\n")
    header: dict[str, Any] = {}
    reason = f"read from {path.name}"
    if first.startswith(_HEADER.encode()):
        source = rest
        try:
            header = json.loads(first.removeprefix(_HEADER.encode()))
            name, origin = _line(header["name"])[:_LONGEST_NAME], Origin(header["origin"])
            created_at, parents = float(header["created_at"]), tuple(map(_line, header["parents"]))
            if not math.isfinite(created_at):
                raise ValueError("no time")
            if "state" in header:
                reason += f"; there it was {State(header['state'])}: {_line(header['reason'])}"
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PolicyError(f"line 1: the header of {path.name} is damaged; remove it") from error
    else:
        name = path.name.removesuffix(SLOW_SUFFIX) if is_slow else path.stem
        origin, created_at, parents = Origin.FILES, now_s, ()
    arm = arm_from_source(
        b"" if is_slow else source,
        name=name,
        origin=origin,
        state=State.CANDIDATE,
        created_at=created_at,
        parents=parents,
        reason=reason,
        slow=source if is_slow else slow,
    )
    if header and header.get("id") != arm.id:
        raise PolicyError(f"line 1: {path.name} was changed after export; remove its first line")
    return arm


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LARGEST_FILE)


def file_name(arm: Arm) -> str:
    """Return the name of the file in which `write_arm` tells of an arm."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in arm.name)
    return f"{name}-{arm.id}{'.py' if arm.source else SLOW_SUFFIX}"


def write_arm(arm: Arm, folder: Path) -> Path:
    """Write an arm to `<name>-<id>.py` in the folder, whole or not at all, and return the path.

    Its slow functions, if it has some, come to stand beside it in `<name>-<id>.plan.py`, first; an
    arm with nothing else is that file alone.
    """
    facts = {"id": arm.id, "name": arm.name, "origin": arm.origin, "state": arm.state}
    facts |= {"created_at": arm.created_at, "parents": arm.parents, "reason": arm.reason}
    lines = [_HEADER + json.dumps(facts)]
    thought = arm.thought.encode("ascii", "backslashreplace").decode("ascii")
    lines += [f"# {line}" for line in thought.splitlines()]
    path = folder / file_name(arm)
    if arm.source and arm.slow:
        write_atomically(path.with_suffix(SLOW_SUFFIX), arm.slow.encode("ascii"))
    write_atomically(path, ("\n".join(lines) + "\n" + (arm.source or arm.slow)).encode("ascii"))
    return path


def policy_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold a policy each, in the order of their names. Raises OSError."""
    files = {p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()}
    beside = {p.with_suffix(SLOW_SUFFIX) for p in files if not p.name.endswith(SLOW_SUFFIX)}
    return sorted(files - beside)


def _line(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError("text is wanted")
    return " ".join(text.split())
