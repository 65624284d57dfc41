"""Where numba keeps compiled kernels: one directory per version of their sources.

Numba looks at the file of the kernel alone, so a kernel that calls a changed one in another file
would stay as it was. Here any change of any kernel's source leads to a fresh directory.
"""

import hashlib
import os
import tempfile
from pathlib import Path

ROOMS = ("arms", "twin")
"""Rooms that hold kernels."""


def use_kernel_cache() -> None:
    """Point numba at the cache for the sources as they are; call it before numba is imported."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((Path(__file__).parent / room).glob("*.py")):
            source = path.read_bytes()
            if b"numba" in source or b"arms.kernels" in source:
                digest.update(path.name.encode() + b"\0" + source)
    os.environ["NUMBA_CACHE_DIR"] = str(_writable(f"kernels-{digest.hexdigest()[:12]}"))


def _writable(name: str) -> Path:
    """Return the user's cache directory of that name; where there is none, one for this process alone."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = home / "autopoiesis" / name
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="autopoiesis-kernels-"))
