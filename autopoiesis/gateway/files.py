"""The secret that two processes share through a file."""

import os
import secrets
from pathlib import Path


def read_or_create_secret(path: Path, length: int = 32) -> bytes:
    """Return the secret in a file that only its owner can read; make one if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        secret = secrets.token_bytes(length)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        return secret
