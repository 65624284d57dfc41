"""The registry as a folder: one policy file per arm, and an index of all that is known of them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import file_name, policy_files, read_arm, write_arm
from autopoiesis.arms.language import PolicyError
from autopoiesis.atomic import write_atomically
from autopoiesis.orchestrator.control_client import RefusedError
from autopoiesis.orchestrator.orders import Orders
from autopoiesis.orchestrator.registrar import NewArm, Said

INDEX = "index.json"
LONGEST_REASON = 1000


class FolderError(ValueError):
    """A folder or file cannot be read or written."""


def export_arms(register: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every arm of `catalogue.register` to a folder, which is made if missing; the index comes last.

    Raises:
        FolderError: the folder cannot be written; files that are there are whole.
    """
    arms = [_arm(told) for told in register]
    index = [told | {"file": file_name(arm)} for told, arm in zip(register, arms, strict=True)]
    for told in index:
        del told["source"], told["slow"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [write_arm(arm, folder) for arm in arms]
        data = orjson.dumps({"arms": index}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        write_atomically(folder / INDEX, data)
    except OSError as error:
        raise FolderError(f"Cannot write to {folder}: {error.strerror or error}.") from None
    return [*paths, folder / INDEX]


def import_arms(folder: Path, orders: Orders, by: str, now_s: float) -> list[dict[str, Any]]:
    """Take in every policy file of a folder as a candidate; say of each file what came of it.

    Each is verified again; parents, origin, name and age are kept; nothing that is here is changed.
    Rows have file, id, name, verdict (added, known or refused) and why.

    Raises:
        FolderError: the folder cannot be read.
    """
    try:
        paths = policy_files(folder)
    except OSError as error:
        raise FolderError(f"Cannot read {folder}: {error.strerror or error}.") from None
    if not paths:
        raise FolderError(f"{folder} holds no policy file (.py or .policy).")
    return [_take_in(path, orders, by, now_s) for path in paths]


def read_policy(path: Path, now_s: float) -> Arm:
    """Read one policy file. Raises PolicyError, and FolderError if it cannot be read."""
    try:
        return read_arm(path, now_s)
    except OSError as error:
        raise FolderError(f"Cannot read {path}: {error.strerror or error}.") from None


def new_arm(arm: Arm, *, name: str = "", canary: bool = False) -> NewArm:
    """Return what to send of an arm that was read from a file."""
    return NewArm(
        source=arm.source,
        name=name or arm.name,
        origin=arm.origin,
        created_at=arm.created_at,
        parents=arm.parents,
        thought=arm.thought,
        reason=arm.reason[:LONGEST_REASON],
        canary=canary,
        slow=arm.slow,
    )


def _take_in(path: Path, orders: Orders, by: str, now_s: float) -> dict[str, Any]:
    try:
        told = orders.add_arm(new_arm(read_policy(path, now_s)), Said(by))
    except (PolicyError, FolderError, RefusedError) as error:
        return {"file": path.name, "id": "", "name": "", "verdict": "refused", "why": str(error)}
    verdict = "added" if told["new"] else "known"
    why = told["reason"] if told["new"] else f"it is here already, {told['state']}"
    return {
        "file": path.name,
        "id": told["id"],
        "name": told["name"],
        "verdict": verdict,
        "why": why,
    }


def _arm(told: dict[str, Any]) -> Arm:
    return Arm(
        id=told["id"],
        name=told["name"],
        origin=Origin(told["origin"]),
        state=State(told["state"]),
        source=told["source"],
        created_at=datetime.fromisoformat(told["created_at"]).replace(tzinfo=UTC).timestamp(),
        parents=tuple(told["parents"]),
        reason=told["reason"],
        pinned=told["pinned"],
        thought=told["thought"],
        slow=told["slow"],
    )
