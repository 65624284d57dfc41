"""Arms as files: any policy a person drops in, and whole registries carried elsewhere."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopoiesis.arms.arm import Arm, Origin, State, arm_id
from autopoiesis.arms.language import PolicyError, thought_of, verify
from autopoiesis.arms.slow import SlowPolicy, verify_slow
from autopoiesis.atomic import write_atomically

SUFFIXES = frozenset({".py", ".policy"})
"""Of files that hold policies."""
SLOW_SUFFIX = ".plan.py"
"""Of files that hold slow policies, each beside the file of its arm."""
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
    slow: str = "",
) -> Arm:
    """Make an arm of a policy's source, and of a slow policy's if there is one; raises PolicyError.

    Without a `thought`, what the source says at its head is taken.
    """
    policy = verify(source)
    text = source if isinstance(source, str) else source.decode("ascii")  # verified: is ASCII
    slow_policy = _slow(slow)
    id_ = arm_id(policy.id, slow_policy.id if slow_policy else "")
    return Arm(
        id=id_,
        name=name or id_,
        origin=origin,
        state=state,
        source=policy.source,
        created_at=created_at,
        parents=parents,
        reason=reason,
        thought=thought or thought_of(text),
        slow=slow_policy.source if slow_policy else "",
    )


def verified(arm: Arm) -> Arm:
    """Verify the arm's sources; return it with both in their normal form and the id that they have.

    Raises PolicyError.
    """
    policy, slow = verify(arm.source), _slow(arm.slow)
    return replace(
        arm,
        id=arm_id(policy.id, slow.id if slow else ""),
        source=policy.source,
        slow=slow.source if slow else "",
    )


def _slow(source: str | bytes) -> SlowPolicy | None:
    if not source:
        return None
    try:
        return verify_slow(source)
    except PolicyError as error:
        raise PolicyError(f"slow functions: {error}") from None


def read_arm(path: Path, now_s: float) -> Arm:
    """Read an arm from a policy file, as a candidate.

    A file that `write_arm` wrote brings its name, origin, parents and age, and its reason tells how
    far it had come there; any other is named after the file. Raises PolicyError (also for a header
    that does not fit) and OSError. A slow policy is read from the file beside it that ends in `.plan.py`.
    """
    with path.open("rb") as file:
        source = file.read(_LARGEST_FILE)
    beside = path.with_suffix(SLOW_SUFFIX)
    slow = ""
    if beside.is_file():
        with beside.open("rb") as file:
            slow = file.read(_LARGEST_FILE).decode("latin-1")
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
        name, origin, created_at, parents = path.stem, Origin.FILES, now_s, ()
    arm = arm_from_source(
        source,
        name=name,
        origin=origin,
        state=State.CANDIDATE,
        created_at=created_at,
        parents=parents,
        reason=reason,
        slow=slow,
    )
    if header and header.get("id") != arm.id:
        raise PolicyError(f"line 1: {path.name} was changed after export; remove its first line")
    return arm


def file_name(arm: Arm) -> str:
    """Return the name under which `write_arm` writes an arm."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in arm.name)
    return f"{name}-{arm.id}.py"


def write_arm(arm: Arm, folder: Path) -> Path:
    """Write an arm to `<name>-<id>.py` in the folder, whole or not at all, and return the path.

    Its slow policy, if it has one, comes to stand beside it in `<name>-<id>.plan.py`, first.
    """
    facts = {"id": arm.id, "name": arm.name, "origin": arm.origin, "state": arm.state}
    facts |= {"created_at": arm.created_at, "parents": arm.parents, "reason": arm.reason}
    lines = [_HEADER + json.dumps(facts)]
    thought = arm.thought.encode("ascii", "backslashreplace").decode("ascii")
    lines += [f"# {line}" for line in thought.splitlines()]
    path = folder / file_name(arm)
    if arm.slow:
        write_atomically(path.with_suffix(SLOW_SUFFIX), arm.slow.encode("ascii"))
    write_atomically(path, ("\n".join(lines) + "\n" + arm.source).encode("ascii"))
    return path


def policy_files(folder: Path) -> list[Path]:
    """Return the policy files of a folder, in the order of their names. Raises OSError."""
    files = (p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return sorted(p for p in files if not p.name.endswith(SLOW_SUFFIX))


def _line(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError("text is wanted")
    return " ".join(text.split())
