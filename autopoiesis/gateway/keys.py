"""The keys with which clients come, one line each: `NAME KEY [REQUESTS-PER-MINUTE]`."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SHORTEST_KEY = 16


class KeyFileError(ValueError):
    """The file of keys cannot be used; the message says why, never what a key is."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client's key. Its name is no secret: it goes to the replicas and the access log."""

    client: str
    key: str
    requests_per_minute: int | None


def read_keys(path: Path, requests_per_minute: int | None = None) -> tuple[ApiKey, ...]:
    """Read the file; `requests_per_minute` holds where a line says nothing. Raise `KeyFileError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        open_to = path.stat().st_mode & 0o077
    except OSError as error:
        raise KeyFileError(f"Cannot read the API keys {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"The API keys {path} are not UTF-8 text.") from None
    if open_to:
        raise KeyFileError(f"Others may read the API keys {path}; say `chmod 600 {path}`.")
    found: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = _key(words, f"{path}, line {number}", requests_per_minute)
        if key.client in found or any(key.key == other.key for other in found.values()):
            raise KeyFileError(f"{path}, line {number}: this name or key is there already.")
        found[key.client] = key
    if not found:
        raise KeyFileError(f"There is no key in {path}; write lines of `NAME KEY`.")
    return tuple(found.values())


def _key(words: list[str], where: str, default: int | None) -> ApiKey:
    if not 2 <= len(words) <= 3:
        raise KeyFileError(f"{where}: a line is `NAME KEY [REQUESTS-PER-MINUTE]`.")
    client, key = words[:2]
    if not _NAME.fullmatch(client):
        raise KeyFileError(f"{where}: a name has letters, digits, '.', '_' and '-' only.")
    if len(key) < SHORTEST_KEY or not key.isascii():
        raise KeyFileError(f"{where}: a key has at least {SHORTEST_KEY} ASCII characters.")
    if len(words) == 2:
        return ApiKey(client, key, default)
    if not words[2].isdecimal() or not 0 < int(words[2]) <= 10_000_000:
        raise KeyFileError(f"{where}: requests per minute are a whole number above 0.")
    return ApiKey(client, key, int(words[2]))
