"""Arms as files: any policy a person drops in, and whole registries carried elsewhere."""

import json
from collections.abc import Iterable
from pathlib import Path

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.language import PolicyError, thought_of, verify

_HEADER = "# arm: "


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
) -> Arm:
    """Make an arm of a policy's source; raises PolicyError.

    Without a `thought`, what the source says at its head is taken.
    """
    policy = verify(source)
    text = source if isinstance(source, str) else source.decode("ascii")  # verified: is ASCII
    return Arm(
        id=policy.id,
        name=name or policy.id,
        origin=origin,
        state=state,
        source=policy.source,
        created_at=created_at,
        parents=parents,
        reason=reason,
        thought=thought or thought_of(text),
    )


def read_arm(path: Path, now_s: float) -> Arm:
    """Read an arm from a policy file, as a candidate.

    A file that `write_arm` wrote brings its name, origin, parents and age; any other is named after
    the file. Raises PolicyError (also for a header that does not fit) and OSError.
    """
    source = path.read_bytes()
    first, _, rest = source.partition(b"\n")
    header = {}
    if first.startswith(_HEADER.encode()):
        source = rest
        try:
            header = json.loads(first.removeprefix(_HEADER.encode()))
            name, origin = str(header["name"]), Origin(header["origin"])
            created_at, parents = float(header["created_at"]), tuple(map(str, header["parents"]))
        except (ValueError, TypeError, KeyError) as error:
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
        reason=f"read from {path.name}",
    )
    if header and header.get("id") != arm.id:
        raise PolicyError(f"line 1: {path.name} was changed after export; remove its first line")
    return arm


def write_arm(arm: Arm, folder: Path) -> Path:
    """Write an arm to `<name>-<id>.py` in the folder and return the path."""
    facts = {"id": arm.id, "name": arm.name, "origin": arm.origin, "state": arm.state}
    facts |= {"created_at": arm.created_at, "parents": arm.parents, "reason": arm.reason}
    lines = [_HEADER + json.dumps(facts)]
    thought = arm.thought.encode("ascii", "backslashreplace").decode("ascii")
    lines += [f"# {line}" for line in thought.splitlines()]
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in arm.name)
    path = folder / f"{name}-{arm.id}.py"
    path.write_text("\n".join(lines) + "\n" + arm.source, "ascii")
    return path


def export_arms(arms: Iterable[Arm], folder: Path) -> list[Path]:
    """Write arms to a folder, which is made if missing; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_arm(arm, folder) for arm in arms]


def import_arms(folder: Path, now_s: float) -> list[Arm]:
    """Read all policy files (.py, .policy) of a folder, in the order of their names."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in {".py", ".policy"} and p.is_file())
    return [read_arm(path, now_s) for path in paths]
