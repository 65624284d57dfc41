"""Profiles as JSON files: the fields of `profiles.json`, for one profile."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from autopoiesis.atomic import write_atomically
from autopoiesis.twin.latency import ClientOverhead, Profile, StepModel


class ProfileError(ValueError):
    """A profile file cannot be used; the message says which field is wrong."""


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    text = json.dumps(asdict(profile), indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def read_profile(path: Path) -> Profile:
    """Read a profile; raise `ProfileError` with one sentence that names the field."""
    try:
        told: Any = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ProfileError(f"{path}: is not valid JSON ({error})") from None
    try:
        return profile_from(told)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def profile_from(told: Any) -> Profile:
    """Make a profile of what `asdict` and JSON made of it; a `ProfileError` names the wrong field."""
    try:
        entry = _checked(told, Profile, "the profile")
        step = StepModel(**_numbers(_checked(entry.pop("step"), StepModel, "`step`"), "step"))
        client = ClientOverhead(
            **_numbers(_checked(entry.pop("client", {}), ClientOverhead, "`client`"), "client")
        )
        return Profile(step=step, client=client, **entry)
    except (ValueError, TypeError, KeyError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ProfileError(what) from None


def _checked(value: Any, kind: type, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be an object, not {type(value).__name__}")
    entry = cast("dict[str, Any]", value)
    known = {f.name: f for f in fields(kind)}
    for name in entry:
        if name not in known:
            raise TypeError(f"{what} has no field {name!r}; there are {', '.join(known)}")
    for name, field in known.items():
        given = entry.get(name)
        if name in {"kv_blocks", "kv_block_tokens", "max_num_seqs", "max_num_batched_tokens"} and (
            given is not None and type(given) is not int
        ):
            raise TypeError(f"{name} must be a whole number, not {given!r}")
        if field.type in {"str", str} and given is not None and not isinstance(given, str):
            raise TypeError(f"{name} must be text, not {given!r}")
    return dict(entry)


def _numbers(entry: dict[str, Any], what: str) -> dict[str, float]:
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{what}.{name} must be a number, not {value!r}")
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{what}.{name} must be a finite number of at least 0, not {value}")
    return entry
