#!/usr/bin/env python3
"""Set up what is needed beside this file (`.venv`), then run a command.

python3 run.py demo ...   any `autopoiesis` command: demo, serve, replay, arms list ...
python3 run.py test ...   the test suite; further arguments go to pytest

Needs nothing but Python 3.11, 3.12 or 3.13 with its venv module.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
VENV = HOME / ".venv"
PYTHON = VENV / "bin" / "python"


def fail(sentence: str) -> None:
    sys.stderr.write(f"run.py: {sentence}\n")
    sys.exit(3)


def set_up(extras: str) -> None:
    """Install the package and its pinned dependencies, once per change of either."""
    asked = b"".join((HOME / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    stamp = VENV / f"installed{extras}"
    wanted = hashlib.sha256(asked + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        sys.stderr.write(f"run.py: making {VENV}\n")
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
        if made.returncode:
            fail(
                "could not make a virtual environment; install Python's venv module "
                "(Debian: apt install python3-venv)."
            )
    sys.stderr.write("run.py: installing (a few minutes the first time)\n")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "-c", str(HOME / "constraints.txt"), "-e", f"{HOME}{extras}"], check=False
    )
    if done.returncode:
        fail("the installation failed; pip's message above says why.")
    stamp.write_text(wanted)


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        fail(
            f"Python 3.11, 3.12 or 3.13 is needed, this is {sys.version.split()[0]}; "
            "run it with another python3."
        )
    arguments = sys.argv[1:] or ["--help"]
    testing = arguments[0] == "test"
    set_up("[dev]" if testing else "")
    command = ["-m", "pytest", *arguments[1:]] if testing else ["-m", "autopoiesis", *arguments]
    if testing:
        os.chdir(HOME)
    os.execv(PYTHON, [str(PYTHON), *command])


if __name__ == "__main__":
    main()
